"""The contract of ``stratified_linear_backward`` in plain PyTorch: any device and dtype."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from .._registry import Backend
from ..stratum_sums.reference import masked_sums, slice_sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def stratified_linear_backward_reference(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
    grad_rows: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    precision: str = "ieee",
) -> None:
    """Write the gradients that are wanted; reads no value on the host.

    Args:
        grad: Gradient of the outputs, [N, D_out] of any floating dtype and strides.
        rows: Inputs of the layer, [N, D_in].
        weight: [D_out, D_in]; None where ``grad_rows`` is.
        ids: int64 [N] in ``0..S-1``.
        row_offsets: Where the rows of each stratum are after sorting, S + 1 ints.
        order: The stable permutation that sorts ``ids``, int64 [N]; None where they are sorted.
        grad_rows: [N, D_in], fully written, or None.
        grad_weight: [S, D_out, D_in], fully written, or None.
        grad_bias: [S, D_out], fully written, or None.
        precision: Not looked at: no product is less precise than its dtype.
    """
    if grad_rows is not None:
        assert weight is not None
        torch.mm(grad, weight, out=grad_rows)
    if grad_weight is not None:
        if order is not None:
            grad, rows, ids = (x.index_select(0, order) for x in (grad, rows, ids))
            order = None
        if grad_weight.dtype is not grad.dtype:  # of 16 bits, kept in 32
            grad, rows = grad.to(grad_weight.dtype), rows.to(grad_weight.dtype)
        _products(grad, rows, row_offsets, grad_weight)
    if grad_bias is not None:
        if grad.device.type == "cpu":
            slice_sums([(grad, None, grad_bias)], row_offsets, order)
        else:
            masked_sums(grad, ids, grad_bias)


def _products(grad: Tensor, rows: Tensor, row_offsets: Sequence[int], out: Tensor) -> None:
    """Write ``out[s] = grad[rows of s]^T rows[rows of s]`` for rows that are sorted by stratum."""
    sizes = [b - a for a, b in itertools.pairwise(row_offsets)]
    if sizes[0] > 0 and min(sizes) == max(sizes):
        # One call costs what one product of all rows does; each of its own loses a fifth.
        shape = (len(sizes), sizes[0], -1)
        torch.bmm(grad.view(shape).mT, rows.view(shape), out=out)
        return
    parts = torch.split(grad.t(), sizes, dim=1), torch.split(rows, sizes)
    for product, grads, inputs in zip(out.unbind(0), *parts, strict=True):
        torch.mm(grads, inputs, out=product)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grad, rows, weight, ids, row_offsets, order: None,
    impl=stratified_linear_backward_reference,
)
