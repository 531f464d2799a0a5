"""The contract of ``stratified_norm_backward`` in plain PyTorch: any device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._registry import Backend
from ..stratum_sums.reference import masked_sums, slice_sums, slices

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    row_offsets: Sequence[int] | None = None,
) -> Tensor | None:
    """Write the gradients that are wanted; no value of a GPU is read on the host.

    Args:
        grad: Gradient of the outputs, [N, D] of any floating dtype and strides.
        rows: Inputs of the normalisation, [N, D].
        mean: Mean of every row, [N].
        rstd: Inverse standard deviation of every row, [N].
        weight: Scale [D], or None for ones.
        ids: int64 [N] in ``0..S-1``.
        grad_rows: [N, D] where that gradient is wanted, else None; not written.
        grad_weight: [S, D], fully written, or None.
        grad_bias: [S, D], fully written, or None.
        row_offsets: Where strata start, S + 1 ints, where the ids are known to be sorted, or None.

    Returns:
        What takes the place of ``grad_rows``: torch makes that gradient itself, and a copy of it
        would cost as much as the rest. None where none is wanted, or there are no rows.
    """
    wide = torch.float32
    for x in (grad, rows, mean, rstd, weight):
        wide = wide if x is None else torch.promote_types(wide, x.dtype)
    grad, centred = grad.to(wide), rows.to(wide) - mean.to(wide).unsqueeze(1)
    rstd = rstd.to(wide).contiguous()
    in_place_of_rows = None
    if grad_rows is not None and rows.numel() > 0:
        # torch folds mean into a product, which loses digits where rows lie far from 0; centred
        # rows have none. Sums over rows are left out: here they are by stratum.
        found, _, _ = torch.ops.aten.native_layer_norm_backward.default(
            grad, centred, rows.shape[1:], torch.zeros_like(rstd).unsqueeze(1), rstd.unsqueeze(1),
            None if weight is None else weight.to(wide).contiguous(), None, [True, False, False],
        )  # fmt: skip
        in_place_of_rows = found.to(grad_rows.dtype).contiguous()
    if grad_weight is None and grad_bias is None:
        return in_place_of_rows
    if rows.device.type == "cpu":
        _sums_on_cpu(grad, centred, rstd, ids, row_offsets, grad_weight, grad_bias)
    else:
        sums_anywhere(grad, centred, rstd, ids, grad_weight, grad_bias)
    return in_place_of_rows


def _sums_on_cpu(
    grad: Tensor,
    centred: Tensor,
    rstd: Tensor,
    ids: Tensor,
    row_offsets: Sequence[int] | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients by stratum; ``centred`` is written over."""
    wanted = grad_bias if grad_weight is None else grad_weight
    assert wanted is not None
    order = None
    if row_offsets is None:
        row_offsets, order = slices(ids, wanted.shape[0])
    sums: list[tuple[Tensor, Tensor | None, Tensor]] = []
    if grad_weight is not None:
        # rstd belongs to whole rows, which are multiplied by it as they are added.
        sums.append((centred.mul_(grad), rstd, grad_weight))
    if grad_bias is not None:
        sums.append((grad, None, grad_bias))
    slice_sums(sums, row_offsets, order)


def sums_anywhere(
    grad: Tensor,
    centred: Tensor,
    rstd: Tensor,
    ids: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients by stratum on any device; reads no value on the host.

    Args:
        grad: [N, D].
        centred: Rows without their means, [N, D]; written over.
        rstd: [N].
        ids: int64 [N] in ``0..S-1``.
        grad_weight: [S, D], fully written, or None.
        grad_bias: [S, D], fully written, or None.
    """
    if grad_weight is not None:
        masked_sums(centred.mul_(rstd.unsqueeze(1)).mul_(grad), ids, grad_weight)
    if grad_bias is not None:
        masked_sums(grad, ids, grad_bias)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grad, rows, mean, rstd, weight, ids, num_strata: None,
    impl=stratified_norm_backward_reference,
)
