"""The contract of ``stratified_norm_backward`` in plain PyTorch: any device and dtype, float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._registry import Backend
from ..stratum_sums.reference import stratum_sums_reference

if TYPE_CHECKING:
    from torch import Tensor


def stratified_norm_backward_reference(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    grad_rows: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients that are wanted; reads no value on the host.

    Args:
        grad: Gradient of the outputs, [N, D] of any floating dtype and strides.
        rows: Inputs of the normalisation, [N, D].
        mean: Mean of every row, [N].
        rstd: Inverse standard deviation of every row, [N].
        weight: Scale [D], or None for ones.
        ids: int64 [N] in ``0..S-1``.
        grad_rows: [N, D], fully written, or None.
        grad_weight: [S, D], fully written, or None.
        grad_bias: [S, D], fully written, or None.
    """
    grad, rstd = grad.double(), rstd.double().unsqueeze(1)
    normed = (rows.double() - mean.double().unsqueeze(1)) * rstd
    if grad_rows is not None:
        scaled = grad if weight is None else grad * weight.double()
        # One sum of both: torch splits a sum with a single result among threads.
        averages = torch.stack((scaled, scaled * normed)).sum(2, keepdim=True) / rows.shape[1]
        grad_rows.copy_((scaled - averages[0] - normed * averages[1]) * rstd)
    if grad_weight is not None:
        stratum_sums_reference(grad * normed, ids, grad_weight)
    if grad_bias is not None:
        stratum_sums_reference(grad, ids, grad_bias)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grad, rows, mean, rstd, weight, ids, num_strata: None,
    impl=stratified_norm_backward_reference,
)
