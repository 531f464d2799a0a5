"""The contract of ``stratified_norm_backward`` in plain PyTorch: any device and dtype."""

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
    """Write the gradients that are wanted; no value of a GPU is read on the host.

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
    wide = torch.float32
    for x in (grad, rows, mean, rstd, weight):
        wide = wide if x is None else torch.promote_types(wide, x.dtype)
    grad, rows = grad.to(wide), rows.to(wide)
    # Without gaps: torch's backward gives other bits where there are some.
    mean, rstd = (x.to(wide).contiguous().unsqueeze(1) for x in (mean, rstd))
    weight = None if weight is None else weight.to(wide).contiguous()
    if grad_rows is not None and rows.numel() > 0:
        # The sums over rows are left out of torch's backward: they are by stratum here.
        found, _, _ = torch.ops.aten.native_layer_norm_backward.default(
            grad, rows, rows.shape[1:], mean, rstd, weight, None, [True, False, False]
        )  # fmt: skip
        grad_rows.copy_(found)
    if grad_weight is not None:
        stratum_sums_reference((rows - mean).mul_(rstd).mul_(grad), ids, grad_weight)
    if grad_bias is not None:
        stratum_sums_reference(grad, ids, grad_bias)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grad, rows, mean, rstd, weight, ids, num_strata: None,
    impl=stratified_norm_backward_reference,
)
