"""A linear layer with weights of its own for every head: plugin heads as one op."""

from .op import cost, routed_linear

__all__ = ["cost", "routed_linear"]
