"""The weighted sum of the stratum gradients of every parameter."""

from .op import combine_unchecked, cost, stratum_combine

__all__ = ["combine_unchecked", "cost", "stratum_combine"]
