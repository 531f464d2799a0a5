"""Stratum gradients by plain autograd, written without the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TOL = {
    torch.float64: 1e-11,  # a norm of two features cancels some digits, in either formula
    torch.float32: 1e-5,  # reductions over at most some thousand rows
}
"""Relative error allowed between one-pass stratum gradients and separate autograd passes."""


def autograd_stratum_gradients(
    losses: Callable[[], Tensor], row_ids: Tensor, parameters: Sequence[Tensor], num_strata: int
) -> list[Tensor]:
    """Return [S, *shape] for each parameter: one autograd pass over its rows for each stratum."""
    gradients = [p.new_zeros((num_strata, *p.shape)) for p in parameters]
    values = losses().flatten()
    for s in range(num_strata):
        rows = row_ids == s
        if not bool(rows.any()):
            continue
        parts = torch.autograd.grad(
            values[rows].mean(), list(parameters), retain_graph=True, allow_unused=True
        )
        for gradient, part in zip(gradients, parts, strict=True):
            if part is not None:
                gradient[s] = part.to_dense() if part.is_sparse else part
    return gradients


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return ``max |got - expected| / max |expected|``; 0 where both are zero."""
    difference = float((got - expected).abs().max()) if expected.numel() else 0.0
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return difference / scale if scale > 0 else difference
