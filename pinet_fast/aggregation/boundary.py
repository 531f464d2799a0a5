"""Boundary ops: where a parameter meets rows of the batch, and its gradient splits by stratum.

Each op computes the ordinary forward, bit for bit, and in backward returns the ordinary gradient
of its rows and, to a virtual leaf of shape [S, *shape], the S stratum gradients of the parameter.
The parameter itself is given detached: it takes no part in the graph.

Every op saves at least one tensor more than the function it replaces. Activation checkpointing
recomputes in backward, outside the interception, and would hand the tensors of the plain function
to these ops, whose order differs; the different count makes it an error instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pinet_fast.aggregation.rows import row_tensor
from pinet_fast.kernels import (
    stratified_linear_backward,
    stratified_norm_backward,
    stratum_sums,
)

if TYPE_CHECKING:
    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.leaves import Term
    from pinet_fast.aggregation.strata_index import RowGroups

# torch.autograd.Function is untyped: its contexts are Any throughout this file.


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply an autograd function without its check for torch.func transforms, 5 us a call.

    The interception refuses those transforms before.
    """
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def folding(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight`` such that products with ``rows`` take the path they take for a parameter.

    torch folds strided batches of rows into one product where the weight requires a gradient, and
    not elsewhere; the two round differently.
    """
    return weight if rows.is_contiguous() else weight.detach().requires_grad_()


class StratifiedLinear(torch.autograd.Function):
    """``y = x W^T + b`` with stratum gradients of W and b; x [*, D_in], W [D_out, D_in]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        groups: RowGroups,
        layout: RowLayout,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, weight)  # one more than the op replaced, see above
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return F.linear(rows, folding(rows, weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, _ = ctx.saved_tensors
        needs, groups = ctx.needs_input_grad, ctx.groups
        flat_grad = row_tensor(grad, 1)
        flat_rows = row_tensor(rows, 1)
        grad_rows, weight_strata, bias_strata = stratified_linear_backward(
            flat_grad, flat_rows, weight, groups.ids, groups.offsets, groups.order,
            need_rows=needs[0], need_weight=needs[3], need_bias=needs[4],
        )  # fmt: skip
        grad_rows = None if grad_rows is None else grad_rows.view(rows.shape)
        # A weight or bias that is not the optimizer's gets its ordinary gradient.
        grad_weight = flat_grad.t().mm(flat_rows) if needs[1] else None
        grad_bias = flat_grad.sum(0) if needs[2] else None
        return grad_rows, grad_weight, grad_bias, weight_strata, bias_strata, None, None


class StratifiedMatmul(torch.autograd.Function):
    """``y = x W`` with stratum gradients of W; x [*, D_in], W [D_in, D_out], often ``E.T``."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        leaf: Tensor,
        groups: RowGroups,
        layout: RowLayout,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, weight)  # one more than the op replaced, see above
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return torch.matmul(rows, folding(rows, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, _ = ctx.saved_tensors
        groups = ctx.groups
        # Computed for W^T, the layout of the item table behind `h @ E.T`.
        grad_rows, strata, _ = stratified_linear_backward(
            row_tensor(grad, 1), row_tensor(rows, 1), weight.t(),
            groups.ids, groups.offsets, groups.order,
            need_rows=ctx.needs_input_grad[0], need_bias=False,
        )  # fmt: skip
        assert strata is not None
        grad_rows = None if grad_rows is None else grad_rows.view(rows.shape)
        return grad_rows, None, strata.transpose(1, 2), None, None


class StratifiedLayerNorm(torch.autograd.Function):
    """LayerNorm over the last dimensions with stratum gradients of its scale and shift."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        normalized_shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        eps: float,
        groups: RowGroups,
        layout: RowLayout,
    ) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(rows, normalized_shape, weight, bias, eps)
        # One more than the op replaced, which saves the shift too; see above.
        ctx.save_for_backward(rows, mean, rstd, weight, bias, mean)
        ctx.normalized_shape = normalized_shape
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, mean, rstd, weight, _, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dims, groups = len(ctx.normalized_shape), ctx.groups
        grad_rows, weight_strata, bias_strata = stratified_norm_backward(
            row_tensor(grad, dims).flatten(1),
            row_tensor(rows, dims).flatten(1),
            mean.flatten(),
            rstd.flatten(),
            None if weight is None else weight.flatten(),
            groups.ids,
            groups.num_strata,
            need_rows=needs[0],
            need_weight=needs[2] or needs[4],
            need_bias=needs[3] or needs[5],
        )
        # A scale or shift that is not the optimizer's gets its ordinary gradient.
        whole: list[Tensor | None] = []
        apart: list[Tensor | None] = []
        for i, sums in enumerate((weight_strata, bias_strata)):
            parts = None if sums is None else sums.view(-1, *ctx.normalized_shape)
            whole.append(None if parts is None or not needs[2 + i] else parts.sum(0))
            apart.append(None if not needs[4 + i] else parts)
        grad_rows = None if grad_rows is None else grad_rows.view_as(rows)
        return grad_rows, None, *whole, *apart, None, None, None


class StratifiedBroadcast(torch.autograd.Function):
    """Broadcasting ``rows (+ or *) p``, with stratum gradients of p: a position table, a gate.

    p's own dimensions must not reach the row dimension, or p would hold values of single rows.
    """

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
        ctx.save_for_backward(*((rows, parameter, parameter) if multiply else ()))
        ctx.multiply = multiply
        ctx.term = term  # read by losses.mark_terms
        ctx.shapes = rows.shape, parameter.shape
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return rows * parameter if multiply else rows + parameter

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, product = grad, grad
        if ctx.multiply:
            rows, parameter, _ = ctx.saved_tensors
            grad_rows, product = grad * parameter, grad * rows
        rows_shape, shape = ctx.shapes
        if ctx.layout.dim == 0 and product.dim() == 2 and shape == product.shape[1:]:
            sums = stratum_sums(product, ctx.groups.ids, ctx.groups.num_strata)
        else:
            parts = ctx.groups.split(product.movedim(ctx.layout.dim, 0))
            sums = torch.stack([_sum_to(part.movedim(0, ctx.layout.dim), shape) for part in parts])
        for_rows = _sum_to(grad_rows, rows_shape) if ctx.needs_input_grad[0] else None
        return for_rows, None, sums, None, None, None, None


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
        ctx.save_for_backward(rows, weight, weight)  # one more than the op replaced, see above
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return F.prelu(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, _ = ctx.saved_tensors
        shape = [1] * rows.dim()
        if weight.numel() > 1:
            shape[1] = weight.numel()
        backward = torch.ops.aten._prelu_kernel_backward
        for_rows, below = backward(grad, rows, weight.view(shape).expand_as(rows))
        parts = ctx.groups.split(below.movedim(ctx.layout.dim, 0))
        size = torch.Size(shape)
        sums = torch.stack(
            [_sum_to(part.movedim(0, ctx.layout.dim), size).reshape(weight.shape) for part in parts]
        )
        return for_rows if ctx.needs_input_grad[0] else None, None, sums, None, None


def _sum_to(rows: Tensor, shape: torch.Size) -> Tensor:
    """Sum ``rows`` over the dimensions that broadcasting added; an empty stratum gives zeros."""
    if rows.shape == shape:
        return rows
    extra = rows.dim() - len(shape)
    dims = [d for d in range(rows.dim()) if d < extra or shape[d - extra] == 1]
    return rows.sum(dims).reshape(shape) if dims else rows
