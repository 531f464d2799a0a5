"""Backward of LayerNorm, with the gradients of scale and shift by stratum."""

from .op import cost, stratified_norm_backward

__all__ = ["cost", "stratified_norm_backward"]
