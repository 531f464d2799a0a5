"""Weights of the strata from the Gram of their gradients."""

from .op import RULES, cost, stratum_solve

__all__ = ["RULES", "cost", "stratum_solve"]
