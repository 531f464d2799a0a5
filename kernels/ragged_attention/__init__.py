"""Causal attention over ragged sequences, without padding."""

from .op import cost, ragged_attention

__all__ = ["cost", "ragged_attention"]
