"""Inner products of the stratum gradients of every parameter."""

from .op import cost, stratum_gram

__all__ = ["cost", "stratum_gram"]
