"""Boundary ops of products of rows and a parameter: ``einsum``, ``bmm`` and ``bilinear``.

The forward is torch's own function; the gradients are written out here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pinet_fast.aggregation.first_order import first_order
from pinet_fast.kernels import stratified_linear_backward, stratum_sums

if TYPE_CHECKING:
    from collections.abc import Callable

    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.strata_index import RowGroups

# torch.autograd.Function is untyped: its contexts are Any throughout this file.


class Letters(NamedTuple):
    """A product of two tensors as einsum writes it, ``rows,weight->out``, one letter a dimension.

    Every letter is in two or three of them, once in each.

    Attributes:
        rows: Of the rows.
        weight: Of the parameter.
        out: Of the result.
    """

    rows: str
    weight: str
    out: str

    @property
    def batched(self) -> str:
        """Return the letters that all three have, in which nothing is summed: heads, channels."""
        return "".join(c for c in self.weight if c in self.rows and c in self.out)

    @property
    def kept(self) -> str:
        """Return the letters of the rows that the parameter does not have: users, positions."""
        return "".join(c for c in self.rows if c not in self.weight)

    @property
    def deep(self) -> str:
        """Return the letters that are summed over."""
        return "".join(c for c in self.weight if c not in self.out)

    @property
    def wide(self) -> str:
        """Return the letters that only the parameter brings."""
        return "".join(c for c in self.weight if c not in self.rows)


class StratifiedContraction(torch.autograd.Function):
    """A product of rows and a parameter, ``function(*before, rows, weight)`` or exchanged.

    Without batched letters it is one linear layer, and so are its gradients. With them the stratum
    gradients are one product for each stratum that is present, on the rows of the stratum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        leaf: Tensor,
        function: Callable[[Tensor, Tensor], Tensor],
        letters: Letters,
        dim: int,
        groups: RowGroups,
        layout: RowLayout,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, weight)  # one more than the op replaced
        ctx.letters = letters
        ctx.dim = dim  # of the rows, in ``rows``
        ctx.groups = groups
        ctx.layout = layout  # of the result; read by provenance.trace
        return function(rows, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, _ = ctx.saved_tensors
        # Under autocast, as the cast in front of the product.
        rows, weight = rows.to(grad.dtype), weight.to(grad.dtype)
        gradients = _by_stratum if ctx.letters.batched else _as_linear
        for_rows, strata = gradients(ctx, grad, rows, weight)
        return for_rows, None, strata, None, None, None, None, None


def _as_linear(
    ctx: Any, grad: Tensor, rows: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor]:
    letters, groups = ctx.letters, ctx.groups
    kept, deep, wide = letters.kept, letters.deep, letters.wide
    for_rows, strata, _ = stratified_linear_backward(
        _matrix(grad, letters.out, kept, wide),
        _matrix(rows, letters.rows, kept, deep),
        _matrix(weight, letters.weight, wide, deep),
        groups.ids, groups.offsets, groups.order,
        need_rows=ctx.needs_input_grad[0], need_bias=False,
    )  # fmt: skip
    assert strata is not None
    sizes = dict(zip(letters.rows + letters.weight, (*rows.shape, *weight.shape), strict=True))
    strata = strata.view(-1, *(sizes[c] for c in wide + deep))
    strata = strata.permute(0, *((wide + deep).index(c) + 1 for c in letters.weight))
    if for_rows is not None:
        for_rows = for_rows.view([sizes[c] for c in kept + deep])
        for_rows = for_rows.permute([(kept + deep).index(c) for c in letters.rows])
    return for_rows, strata


def _matrix(tensor: Tensor, letters: str, above: str, across: str) -> Tensor:
    """Return the tensor with the dimensions of ``above`` as one and those of ``across`` as one."""
    sizes = dict(zip(letters, tensor.shape, strict=True))
    moved = tensor.permute([letters.index(c) for c in above + across])
    return moved.reshape(math.prod(sizes[c] for c in above), math.prod(sizes[c] for c in across))


def _by_stratum(
    ctx: Any, grad: Tensor, rows: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor]:
    letters, groups = ctx.letters, ctx.groups
    rows, weight = rows.conj(), weight.conj()
    for_rows = None
    if ctx.needs_input_grad[0]:
        for_rows = torch.einsum(f"{letters.out},{letters.weight}->{letters.rows}", grad, weight)
    strata = weight.new_zeros(groups.num_strata, *weight.shape)
    place = ctx.layout.dim
    parts = zip(
        groups.split(grad.movedim(place, 0)), groups.split(rows.movedim(ctx.dim, 0)), strict=True
    )
    equation = f"{letters.out},{letters.rows}->{letters.weight}"
    for stratum, (of_grad, of_rows) in enumerate(parts):
        if len(of_rows):
            strata[stratum] = torch.einsum(
                equation, of_grad.movedim(0, place), of_rows.movedim(0, ctx.dim)
            )
    return for_rows, strata


class StratifiedBilinear(torch.autograd.Function):
    """``y_o = x1^T W_o x2 + b_o`` with stratum gradients of W and b.

    x1 [*, D1], x2 [*, D2], W [D_out, D1, D2]. Backward holds [N, D_out * D1] numbers: with the
    products of its gradient and x1 the op is a linear layer of x2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        groups: RowGroups,
        layout: RowLayout,
    ) -> Tensor:
        ctx.save_for_backward(left, right, weight, weight)  # one more than the op replaced
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return torch.bilinear(left, right, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, weight, _ = ctx.saved_tensors
        needs, groups = ctx.needs_input_grad, ctx.groups
        wide, deep, _ = weight.shape
        flat = grad.reshape(-1, wide)
        x1, x2 = (t.reshape(-1, t.shape[-1]).to(grad.dtype) for t in (left, right))
        matrix = weight.to(grad.dtype).reshape(wide * deep, -1)
        products = (flat.unsqueeze(2) * x1.unsqueeze(1)).flatten(1)
        for_right, strata, _ = stratified_linear_backward(
            products, x2, matrix, groups.ids, groups.offsets, groups.order,
            need_rows=needs[1], need_weight=needs[4], need_bias=False,
        )  # fmt: skip
        for_left = None
        if needs[0]:
            through = x2.mm(matrix.t()).view(-1, wide, deep)
            for_left = torch.bmm(flat.unsqueeze(1), through).view(left.shape)
        # A weight or bias that is not the optimizer's gets its ordinary gradient.
        return (
            for_left,
            None if for_right is None else for_right.view(right.shape),
            products.t().mm(x2).view(weight.shape) if needs[2] else None,
            flat.sum(0) if needs[3] else None,
            None if strata is None else strata.view(-1, *weight.shape),
            stratum_sums(flat, groups.ids, groups.num_strata) if needs[5] else None,
            None,
            None,
        )
