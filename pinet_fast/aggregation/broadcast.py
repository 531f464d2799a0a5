"""Boundary ops of broadcasting: sums, products and quotients of rows and a parameter, and PReLU.

As those of ``boundary.py``. A parameter's own dimensions must not reach the row dimension, or it
would hold values of single rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.first_order import first_order
from pinet_fast.kernels import stratum_sums

if TYPE_CHECKING:
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
    ) -> Tensor:
        if multiply:
            ctx.save_for_backward(rows, parameter, parameter)
        ctx.multiply = multiply
        ctx.term = term  # read by losses.mark_terms
        ctx.shapes = rows.shape, parameter.shape
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return rows * parameter if multiply else rows + parameter

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, product = grad, grad
        if ctx.multiply:
            rows, parameter, _ = ctx.saved_tensors
            grad_rows, product = grad * parameter, grad * rows
        rows_shape, shape = ctx.shapes
        sums = _strata_to(product, shape, ctx.groups, ctx.layout)
        for_rows = _sum_to(grad_rows, rows_shape) if ctx.needs_input_grad[0] else None
        return for_rows, None, sums, None, None, None, None


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
        for_above = grad / below
        for_below = -grad * ((above / below) / below)
        of_rows, of_parameter = (for_below, for_above) if ctx.by_rows else (for_above, for_below)
        sums = _strata_to(of_parameter, parameter.shape, ctx.groups, ctx.layout)
        for_rows = _sum_to(of_rows, rows.shape) if ctx.needs_input_grad[0] else None
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
    """Sum ``rows`` over the dimensions that broadcasting added; an empty stratum gives zeros."""
    if rows.shape == shape:
        return rows
    extra = rows.dim() - len(shape)
    dims = [d for d in range(rows.dim()) if d < extra or shape[d - extra] == 1]
    return rows.sum(dims).reshape(shape) if dims else rows


def _strata_to(values: Tensor, shape: torch.Size, groups: RowGroups, layout: RowLayout) -> Tensor:
    """Sum the rows of each stratum, and over what broadcasting added: [S, *shape]."""
    own = shape[1:] if len(shape) == values.dim() and shape[0] == 1 else shape
    if layout.dim == 0 and values.dim() > 1 and own == values.shape[1:]:
        # A value of its own for every number of a row: csrc/nodes.cpp does the same.
        sums: Tensor = stratum_sums(values.flatten(1), groups.ids, groups.num_strata)
        return sums.view(-1, *shape)
    parts = groups.split(values.movedim(layout.dim, 0))
    return torch.stack([_sum_to(part.movedim(0, layout.dim), shape) for part in parts])
