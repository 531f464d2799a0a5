"""Zeros and scales that dropout multiplies by."""

from .op import cost, dropout_mask

__all__ = ["cost", "dropout_mask"]
