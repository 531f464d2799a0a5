"""The contract of ``routed_linear`` in plain PyTorch: any device and dtype."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from .._registry import Backend
from ..stratified_linear.reference import stratified_linear_backward_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def routed_linear_reference(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
    out: Tensor,
    precision: str = "ieee",
) -> None:
    """Write ``out[i] = weight[ids[i]] rows[i] + bias[ids[i]]``; reads no value on the host.

    Args:
        rows: [N, D_in] of any floating dtype and strides.
        weight: [H, D_out, D_in].
        bias: [H, D_out], or None.
        ids: int64 [N] in ``0..H-1``.
        row_offsets: Where the rows of each head are after sorting, H + 1 ints.
        order: The stable permutation that sorts ``ids``, int64 [N]; None where they are sorted.
        out: [N, D_out], fully written.
        precision: Not looked at: no product is less precise than its dtype.
    """
    routed = rows if order is None else rows.index_select(0, order)
    outs = out if order is None else torch.empty_like(out)
    for h, (a, b) in enumerate(itertools.pairwise(row_offsets)):
        outs[a:b] = torch.nn.functional.linear(
            routed[a:b], weight[h], None if bias is None else bias[h]
        )
    if order is not None:
        out.index_copy_(0, order, outs)


def routed_linear_backward_reference(
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
        grad: Gradient of the outputs, [N, D_out] of the dtype of ``rows``, any strides.
        rows: [N, D_in].
        weight: [H, D_out, D_in]; None where ``grad_rows`` is.
        ids: int64 [N] in ``0..H-1``.
        row_offsets: H + 1 ints, as of the forward.
        order: As of the forward.
        grad_rows: [N, D_in], fully written, or None.
        grad_weight: [H, D_out, D_in], fully written, or None.
        grad_bias: [H, D_out], fully written, or None.
        precision: As of the forward.
    """
    if grad_rows is not None:
        assert weight is not None
        routed_linear_reference(
            grad, weight.transpose(1, 2), None, ids, row_offsets, order, grad_rows
        )
    # What a head's rows give its weight is what a stratum's rows give a shared one.
    stratified_linear_backward_reference(
        grad, rows, None, ids, row_offsets, order, None, grad_weight, grad_bias
    )


FORWARD = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda rows, weight, bias, ids, row_offsets, order: None,
    impl=routed_linear_reference,
)
BACKWARD = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grad, rows, weight, ids, row_offsets, order: None,
    impl=routed_linear_backward_reference,
)
