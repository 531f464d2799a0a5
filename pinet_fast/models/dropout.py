"""Dropout by masks drawn together: torch's own draws take most of a small step on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast.kernels import dropout_mask

if TYPE_CHECKING:
    from collections.abc import Sequence


class Masks:
    """Dropout of several tensors of one shape in a forward.

    On a CPU all masks are drawn at once, by :func:`pinet_fast.kernels.dropout_mask`: the rate is
    rounded to a multiple of 1 / 65536, and the scale is that of the rounded rate, so the mean is
    exact. They follow torch's default generator, but are not those that ``F.dropout`` would draw.
    Elsewhere, and in compiled code, this is ``F.dropout``.

    Args:
        like: A tensor of the shape, dtype and device of those to come.
        rate: Probability of zero, 0 <= rate < 1.
        count: How many there are.
        training: False drops nothing.
    """

    def __init__(self, like: Tensor, rate: float, count: int, training: bool = True) -> None:
        self.rate = rate if training else 0.0
        self._masks: Sequence[Tensor] | None = None
        if self.rate > 0.0 and count > 0 and like.is_cpu and not torch.compiler.is_compiling():
            with torch._C.DisableTorchFunction():  # nothing here is of interest to a mode
                self._masks = dropout_mask(like, rate, count=count).unbind(0)

    def drop(self, x: Tensor, place: int) -> Tensor:
        """Zero elements of one of the tensors and scale the others.

        Args:
            x: The tensor.
            place: Which one it is, 0 to ``count - 1``: the same has the same mask.
        """
        if self._masks is not None:
            mask = self._masks[place]
            return x * (mask if mask.dtype is x.dtype else mask.to(x.dtype))
        return x if self.rate == 0.0 else F.dropout(x, self.rate)

    def where(self, training: bool) -> Masks:
        """Return these masks, or none for a part of the model that is not in training."""
        return self if training else _NO_MASKS


_NO_MASKS = Masks(torch.empty(0, device="cpu"), 0.0, 0)


def dropout(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """Zero every element with probability ``rate`` and scale the others, by a mask of its own.

    Args:
        x: Any shape, any floating dtype.
        rate: Probability of zero, 0 <= rate < 1.
        training: False returns ``x`` itself.

    Returns:
        A tensor like ``x``.
    """
    return Masks(x, rate, 1, training).drop(x, 0)


class Dropout(nn.Dropout):
    """``nn.Dropout`` by :func:`dropout`.

    Args:
        p: Probability of zero; at most 65535 / 65536 of the elements are dropped.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` with elements dropped, in training."""
        return dropout(input, self.p, self.training)

    def masks(self, like: Tensor, count: int) -> Masks:
        """Return the dropout of ``count`` tensors of one shape."""
        return Masks(like, self.p, count, self.training)
