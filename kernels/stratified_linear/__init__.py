"""Backward of a linear layer, with the gradients of weight and bias by stratum."""

from .op import cost, stratified_linear_backward

__all__ = ["cost", "stratified_linear_backward"]
