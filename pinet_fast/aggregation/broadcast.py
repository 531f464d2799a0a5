"""Boundary ops of broadcasting: sums, products and quotients of rows and a parameter, and PReLU.

As those of ``boundary.py``. A parameter's own dimensions must not reach the row dimension, or it
would hold values of single rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.first_order import first_order
from pinet_fast.kernels import stratum_sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.leaves import Term
    from pinet_fast.aggregation.strata_index import RowGroups

# torch.autograd.Function is untyped: its contexts are Any throughout this file.


class StratifiedBroadcast(torch.autograd.Function):
    """Broadcasting ``rows (+ or *) p``, with stratum gradients of p: a position table, a gate."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        parameter: Tensor,
        leaf: Tensor,
        multiply: bool,
        groups: RowGroups,
        layout: RowLayout,
        term: Term | None,
        is_first: bool,
    ) -> Tensor:
        if multiply:
            ctx.save_for_backward(rows, parameter, parameter)
        ctx.multiply = multiply
        ctx.term = term  # read by losses.mark_terms
        ctx.shapes = rows.shape, parameter.shape
        ctx.are_complex = rows.is_complex(), parameter.is_complex()
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        # Exchanged sides may give other strides, and complex products another last bit.
        left, right = (parameter, rows) if is_first else (rows, parameter)
        return left * right if multiply else left + right

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, product = grad, grad
        if ctx.multiply:
            rows, parameter, _ = ctx.saved_tensors
            grad_rows, product = grad * parameter.conj(), grad * rows.conj()
        rows_shape, shape = ctx.shapes
        of_rows, of_parameter = ctx.are_complex
        sums = _strata_to(_real(product, of_parameter), shape, ctx.groups, ctx.layout)
        for_rows = None
        if ctx.needs_input_grad[0]:
            for_rows = _sum_to(_real(grad_rows, of_rows), rows_shape)
        return for_rows, None, sums, None, None, None, None, None


class StratifiedDivision(torch.autograd.Function):
    """Broadcasting ``rows / p`` or ``p / rows``, with stratum gradients of p: a temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        parameter: Tensor,
        leaf: Tensor,
        by_rows: bool,
        groups: RowGroups,
        layout: RowLayout,
    ) -> Tensor:
        ctx.save_for_backward(rows, parameter, parameter)  # one more than the op replaced
        ctx.by_rows = by_rows
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return parameter / rows if by_rows else rows / parameter

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, parameter, _ = ctx.saved_tensors
        above, below = (parameter, rows) if ctx.by_rows else (rows, parameter)
        # As torch computes them, product by product.
        for_above = grad / below.conj()
        for_below = -grad * ((above / below) / below).conj()
        of_rows, of_parameter = (for_below, for_above) if ctx.by_rows else (for_above, for_below)
        of_parameter = _real(of_parameter, parameter.is_complex())
        sums = _strata_to(of_parameter, parameter.shape, ctx.groups, ctx.layout)
        for_rows = None
        if ctx.needs_input_grad[0]:
            for_rows = _sum_to(_real(of_rows, rows.is_complex()), rows.shape)
        return for_rows, None, sums, None, None, None


class StratifiedPReLU(torch.autograd.Function):
    """``max(0, x) + w min(0, x)`` with stratum gradients of w: one number, or one a channel.

    Channels are dimension 1, as in ``F.prelu``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        leaf: Tensor,
        groups: RowGroups,
        layout: RowLayout,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, weight)  # one more than the op replaced
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return F.prelu(rows, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, _ = ctx.saved_tensors
        shape = [1] * rows.dim()
        if weight.numel() > 1:
            shape[1] = weight.numel()
        backward = torch.ops.aten._prelu_kernel_backward
        for_rows, below = backward(grad, rows, weight.view(shape).expand_as(rows))
        sums = _strata_to(below, torch.Size(shape), ctx.groups, ctx.layout)
        sums = sums.view(-1, *weight.shape)
        return for_rows if ctx.needs_input_grad[0] else None, None, sums, None, None


def _sum_to(rows: Tensor, shape: torch.Size) -> Tensor:
    """Sum ``rows`` over the dimensions that broadcasting added."""
    if rows.shape == shape:
        return rows
    extra = rows.dim() - len(shape)
    dims = [d for d in range(rows.dim()) if d < extra or shape[d - extra] == 1]
    return rows.sum(dims).reshape(shape) if dims else rows


def _real(grad: Tensor, of_complex: bool) -> Tensor:
    """Return what of the gradient of a complex result belongs to an operand."""
    return grad.real if grad.is_complex() and not of_complex else grad


def _strata_to(
    values: Tensor, shape: Sequence[int], groups: RowGroups, layout: RowLayout
) -> Tensor:
    """Sum the rows of each stratum, and over what broadcasting added: [S, *shape].

    First over the other dimensions, by torch, one sum for each row, so that one kernel does the
    rest whatever S is; ``csrc/nodes.cpp`` does the same.
    """
    if values.is_complex():
        pairs = _strata_to(torch.view_as_real(values.resolve_conj()), (*shape, 2), groups, layout)
        return torch.view_as_complex(pairs)
    extra = values.dim() - len(shape)
    repeated = [
        dim
        for dim, size in enumerate(values.shape)
        if dim != layout.dim and size != 1 and (dim < extra or shape[dim - extra] == 1)
    ]
    if repeated:
        wide = torch.promote_types(values.dtype, torch.float32)
        values = values.sum(repeated, keepdim=True, dtype=wide)
    rows = values.movedim(layout.dim, 0) if layout.dim else values
    flat = rows if rows.dim() == 2 else rows.reshape(rows.shape[0], math.prod(shape))
    sums: Tensor = stratum_sums(flat, groups.ids, groups.num_strata)
    return sums.view(groups.num_strata, *shape)
