"""The contract of ``stratified_norm_backward`` in plain PyTorch: any device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._registry import Backend
from ..stratum_sums.reference import masked_sums, slice_sums, slices

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
    spare = None
    if grad_rows is not None and rows.numel() > 0:
        # The sums over rows are left out of torch's backward: they are by stratum here.
        spare, _, _ = torch.ops.aten.native_layer_norm_backward.default(
            grad, rows, rows.shape[1:], mean, rstd, weight, None, [True, False, False]
        )  # fmt: skip
        grad_rows.copy_(spare)
    if rows.device.type == "cpu":
        _sums_on_cpu(grad, rows, mean, rstd, ids, spare, grad_weight, grad_bias)
    else:
        sums_anywhere(grad, rows, mean, rstd, ids, grad_weight, grad_bias)


def _sums_on_cpu(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ids: Tensor,
    spare: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients by stratum; ``spare``, if there is one, may be written over."""
    wanted = grad_bias if grad_weight is None else grad_weight
    if wanted is None:
        return
    row_offsets, order = slices(ids, wanted.shape[0])
    if grad_weight is not None:
        # rstd belongs to whole rows, which are multiplied by it as they are added.
        products = torch.sub(rows, mean, out=spare).mul_(grad)
        slice_sums(products, row_offsets, order, grad_weight, rstd.squeeze(1))
    if grad_bias is not None:
        slice_sums(grad, row_offsets, order, grad_bias)


def sums_anywhere(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ids: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients by stratum on any device; reads no value on the host.

    Args:
        grad: [N, D].
        rows: [N, D].
        mean: [N, 1].
        rstd: [N, 1].
        ids: int64 [N] in ``0..S-1``.
        grad_weight: [S, D], fully written, or None.
        grad_bias: [S, D], fully written, or None.
    """
    if grad_weight is not None:
        masked_sums((rows - mean).mul_(rstd).mul_(grad), ids, grad_weight)
    if grad_bias is not None:
        masked_sums(grad, ids, grad_bias)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grad, rows, mean, rstd, weight, ids, num_strata: None,
    impl=stratified_norm_backward_reference,
)
