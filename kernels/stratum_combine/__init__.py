"""The weighted sum of the stratum gradients of every parameter."""

from .op import cost, stratum_combine

__all__ = ["cost", "stratum_combine"]
