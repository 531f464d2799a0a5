"""The contract of ``stratum_combine`` in plain PyTorch: any device, any dtype, float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def stratum_combine_reference(
    grads: Sequence[Tensor],
    weights: Tensor,
    outs: Sequence[Tensor],
    scale: Tensor | None,
    accumulate: Sequence[bool],
    rows: Sequence[Tensor | None],
) -> None:
    """Write or add ``sum_s weights[p, s] * scale * grads[p][s]`` to ``outs[p]``.

    Args:
        grads: P tensors [S, ...], or [S, U, ...] with ``rows``.
        weights: [P, S] float64.
        outs: P tensors [...], or [V, ...] with ``rows``; fully written, or added to.
        scale: float64 [], or None for one.
        accumulate: P choices: add.
        rows: int64 [U], or None, of every parameter.
    """
    if scale is not None:
        weights = torch.where(weights == 0, 0.0, weights * scale)
    for grad, row, out, add, touched in zip(grads, weights, outs, accumulate, rows, strict=True):
        total = torch.zeros(grad.shape[1:], dtype=torch.float64, device=out.device)
        for weight, part in zip(row, grad, strict=True):
            # A stratum without weight must not show, whatever it holds: 0 * NaN would.
            total += torch.where(weight == 0, 0.0, weight * part.double())
        if touched is not None:
            full = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
            total = full.index_copy_(0, touched, total)
        out.copy_(out.double() + total if add else total)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grads, outs: None,
    impl=stratum_combine_reference,
)
