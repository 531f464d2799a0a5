"""Boundary ops: where a parameter meets rows of the batch, and its gradient splits by stratum.

Each op computes the ordinary forward, bit for bit, and in backward returns the ordinary gradient
of its rows and, to a virtual leaf of shape [S, *shape], the S stratum gradients of the parameter.
The parameter itself is given detached: it takes no part in the graph.

Every op saves at least one tensor more than the function it replaces. Activation checkpointing
recomputes in backward, outside the interception, and would hand the tensors of the plain function
to these ops, whose order differs; the different count makes it an error instead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from pinet_fast.aggregation.first_order import first_order
from pinet_fast.aggregation.rows import row_tensor
from pinet_fast.kernels import (
    stratified_linear_backward,
    stratified_norm_backward,
    stratum_sums,
)

if TYPE_CHECKING:
    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.strata_index import RowGroups

# torch.autograd.Function is untyped: its contexts are Any throughout this file.


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply an autograd function without its check for torch.func transforms, 5 us a call.

    The interception refuses those transforms before.
    """
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def folding(weight: Tensor) -> Tensor:
    """Return ``weight`` such that products with strided rows take the path of a parameter.

    torch folds strided batches of rows into one product where the weight requires a gradient, and
    not elsewhere; the two round differently.
    """
    return weight.detach().requires_grad_()


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
        return F.linear(rows, weight if rows.is_contiguous() else folding(weight), bias)

    @staticmethod
    @first_order
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
        return torch.matmul(rows, weight if rows.is_contiguous() else folding(weight))

    @staticmethod
    @first_order
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
    @first_order
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
            row_offsets=groups.offsets if groups.order is None else None,
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


class StratifiedGroupNorm(torch.autograd.Function):
    """Norm over groups of channels of [N, C, *] with stratum gradients of its scale and shift."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        eps: float,
        groups: RowGroups,
        layout: RowLayout,
    ) -> Tensor:
        rows = _as_norms_take_it(rows)
        sizes = rows.shape[0], rows.shape[1], math.prod(rows.shape[2:])
        scale = None if weight is None else weight.contiguous()
        shift = None if bias is None else bias.contiguous()
        out, mean, rstd = torch.native_group_norm(rows, scale, shift, *sizes, num_groups, eps)
        ctx.save_for_backward(rows, mean, rstd, scale, mean)  # one more than the op replaced
        ctx.sizes = sizes
        ctx.num_groups = num_groups
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, mean, rstd, weight, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_rows = None
        if needs[0]:
            grad_rows = torch.ops.aten.native_group_norm_backward(
                _as_norms_take_it(grad, like=rows), rows, mean, rstd, weight, *ctx.sizes,
                ctx.num_groups, [True, False, False],
            )[0]  # fmt: skip
        # Each row's sums over positions, in float32 at least, [N, C]; then those of strata.
        num_rows, channels, _ = ctx.sizes
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad = grad.reshape(*ctx.sizes).to(wide)
        of_shift = grad.sum(2)
        sums: list[Tensor | None] = [None, None]
        if needs[2] or needs[4]:
            per_group = num_rows, ctx.num_groups, channels // ctx.num_groups
            products = (grad * rows.reshape(*ctx.sizes)).sum(2).view(per_group)
            centred = products - of_shift.view(per_group) * mean.view(num_rows, -1, 1)
            of_scale = (centred * rstd.view(num_rows, -1, 1)).view(num_rows, channels)
            sums[0] = stratum_sums(of_scale, ctx.groups.ids, ctx.groups.num_strata)
        if needs[3] or needs[5]:
            sums[1] = stratum_sums(of_shift, ctx.groups.ids, ctx.groups.num_strata)
        # A scale or shift that is not the optimizer's gets its ordinary gradient.
        whole = [s.sum(0) if s is not None and needs[2 + i] else None for i, s in enumerate(sums)]
        apart = [s if needs[4 + i] else None for i, s in enumerate(sums)]
        return grad_rows, None, *whole, *apart, None, None, None


def _as_norms_take_it(rows: Tensor, like: Tensor | None = None) -> Tensor:
    """Return rows contiguous, as ``torch.group_norm`` hands them to its kernel.

    A CPU keeps channels last where ``like``, or the rows themselves, have them so.
    """
    if rows.device.type != "cpu":
        return rows.contiguous()
    return rows.contiguous(memory_format=suggest_memory_format(rows if like is None else like))
