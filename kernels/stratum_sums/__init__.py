"""The sum of the rows of every stratum."""

from .op import cost, stratum_sums

__all__ = ["cost", "stratum_sums"]
