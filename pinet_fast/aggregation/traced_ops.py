"""Boundary ops inside compiled graphs: taps that hand stratum gradients to virtual leaves.

In a compiled graph a boundary is the ordinary function of detached parameters, followed by a tap:
forward it is the identity, backward it passes the gradient on and gives a virtual leaf its S
stratum gradients. So the compiler fuses and differentiates the model as ever. The groups of the
batch's rows are no tensors of the graph; a tap looks them up by the batch's key when it runs, and
one graph serves any strata, any offsets and any number of users.

``kind`` is the kind of rows as a number: see ``KINDS``.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast.errors import AggregationError
from pinet_fast.kernels import stratified_linear_backward, stratum_sums

if TYPE_CHECKING:
    from collections.abc import Callable

    from pinet_fast.aggregation.rows import BatchRows
    from pinet_fast.aggregation.strata_index import RowGroups

# torch.autograd.Function is untyped: its contexts are Any throughout this file.

KINDS = ("users", "events")

_LIBRARY = torch.library.Library("pinet_fast", "DEF")  # type: ignore[no-untyped-call]
_batches: weakref.WeakValueDictionary[int, BatchRows] = weakref.WeakValueDictionary()
_keys = itertools.count(1)


def key_of(rows: BatchRows) -> Tensor:
    """Return the key, int64 [1] on the host, by which ops of compiled graphs find ``rows``."""
    key = next(_keys)
    _batches[key] = rows
    return torch.tensor([key])


def _groups(key: Tensor, kind: int, outer: int, inner: int) -> RowGroups:
    rows = _batches.get(int(key))
    if rows is None:
        raise AggregationError(
            "backward: the batch of this compiled graph is gone; call opt.backward(losses) before "
            "the next stratify, step or zero_grad"
        )
    return rows.groups_of_kind(KINDS[kind], outer, inner)


def _weight_kernel(
    grad: Tensor, rows: Tensor, key: Tensor, kind: int, outer: int, inner: int, num_strata: int
) -> Tensor:
    flat_grad, flat_rows = grad.reshape(-1, grad.shape[-1]), rows.reshape(-1, rows.shape[-1])
    groups = _groups(key, kind, outer, inner)
    strata: Tensor
    _, strata, _ = stratified_linear_backward(
        flat_grad, flat_rows.to(grad.dtype), None, groups.ids, groups.offsets, groups.order,
        need_rows=False, need_bias=False,
    )  # fmt: skip
    return strata


def _weight_fake(
    grad: Tensor, rows: Tensor, key: Tensor, kind: int, outer: int, inner: int, num_strata: int
) -> Tensor:
    shape = (num_strata, grad.shape[-1], rows.shape[-1])
    out: Tensor = grad.new_empty(shape, dtype=_summed_dtype(grad.dtype))
    return out


def _sums_kernel(
    rows: Tensor, key: Tensor, kind: int, outer: int, inner: int, num_strata: int
) -> Tensor:
    sums: Tensor = stratum_sums(rows, _groups(key, kind, outer, inner).ids, num_strata)
    return sums


def _sums_fake(
    rows: Tensor, key: Tensor, kind: int, outer: int, inner: int, num_strata: int
) -> Tensor:
    out: Tensor = rows.new_empty((num_strata, rows.shape[1]), dtype=_summed_dtype(rows.dtype))
    return out


def _summed_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _lookup_kernel(
    table: Tensor, leaf: Tensor, items: Tensor, key: Tensor, kind: int, outer: int, inner: int,
    padding_idx: int, number: int, num_strata: int,
) -> Tensor:  # fmt: skip
    return torch.nn.functional.embedding(items, table)


def _lookup_fake(
    table: Tensor, leaf: Tensor, items: Tensor, key: Tensor, kind: int, outer: int, inner: int,
    padding_idx: int, number: int, num_strata: int,
) -> Tensor:  # fmt: skip
    return table.new_empty((*items.shape, *table.shape[1:]))


def _lookup_backward_kernel(
    grad: Tensor, items: Tensor, key: Tensor, kind: int, outer: int, inner: int,
    padding_idx: int, number: int, num_strata: int, num_items: int,
) -> Tensor:  # fmt: skip
    ids = items.reshape(-1).long()
    values = grad.reshape(ids.numel(), grad.shape[-1])
    strata = _groups(key, kind, outer, inner).ids
    if padding_idx >= 0:
        kept = ids != padding_idx
        strata, ids, values = strata[kept], ids[kept], values[kept]
    else:
        values = values.clone()  # the compiler may write into its buffer again
    # Delivered past the graph: compilers know no sparse gradients.
    _batches[int(key)].delivered[number] = torch.sparse_coo_tensor(
        torch.stack([strata, ids]), values, (num_strata, num_items, grad.shape[-1]),
        check_invariants=False,
    )  # fmt: skip
    return grad.new_zeros(1)


def _lookup_backward_fake(
    grad: Tensor, items: Tensor, key: Tensor, kind: int, outer: int, inner: int,
    padding_idx: int, number: int, num_strata: int, num_items: int,
) -> Tensor:  # fmt: skip
    return grad.new_empty(1)


def _lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, _, items, key, *ctx.layout, ctx.num_strata = inputs
    ctx.save_for_backward(items, key)
    ctx.num_items = table.shape[0]


def _lookup_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    items, key = ctx.saved_tensors
    token = torch.ops.pinet_fast.traced_lookup_backward(
        grad, items, key, *ctx.layout, ctx.num_strata, ctx.num_items
    )
    return None, token, *[None] * 8


_LAYOUT = "Tensor key, SymInt kind, SymInt outer, SymInt inner"
_OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    f"traced_weight(Tensor grad, Tensor rows, {_LAYOUT}, SymInt num_strata) -> Tensor": (
        _weight_kernel, _weight_fake,
    ),
    f"traced_sums(Tensor rows, {_LAYOUT}, SymInt num_strata) -> Tensor": (_sums_kernel, _sums_fake),
    f"traced_lookup(Tensor table, Tensor leaf, Tensor items, {_LAYOUT}, SymInt padding_idx,"
    " SymInt number, SymInt num_strata) -> Tensor": (_lookup_kernel, _lookup_fake),
    f"traced_lookup_backward(Tensor grad, Tensor items, {_LAYOUT}, SymInt padding_idx,"
    " SymInt number, SymInt num_strata, SymInt num_items) -> Tensor": (
        _lookup_backward_kernel, _lookup_backward_fake,
    ),
}  # fmt: skip
for _schema, (_kernel, _fake) in _OPS.items():
    _name = _schema[: _schema.index("(")]
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"pinet_fast::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "pinet_fast::traced_lookup", _lookup_backward, setup_context=_lookup_setup, lib=_LIBRARY
)


class WeightTap(torch.autograd.Function):
    """Hands the stratum gradients of W, where ``y = x W^T``, to a leaf [S, D_out, D_in]."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, rows: Tensor, leaf: Tensor, key: Tensor, kind: int, outer: int,
        inner: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(rows, key)
        ctx.layout = (kind, outer, inner)
        ctx.num_strata = leaf.shape[0]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, key = ctx.saved_tensors
        leaf = torch.ops.pinet_fast.traced_weight(grad, rows, key, *ctx.layout, ctx.num_strata)
        return grad, None, leaf, None, None, None, None


class SumTap(torch.autograd.Function):
    """Hands the stratum sums of the output's gradient to a leaf: of what was added to rows.

    ``dim`` holds the rows, ``reduced`` are the other dimensions that broadcasting added.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, leaf: Tensor, key: Tensor, kind: int, outer: int, inner: int,
        dim: int, reduced: list[int], sign: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(key)
        ctx.place = (kind, outer, inner, leaf.shape, dim, reduced)
        ctx.sign = sign
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (key,) = ctx.saved_tensors
        sums = _sums_into(grad, key, *ctx.place)
        return (grad, sums if ctx.sign > 0 else -sums, *[None] * 7)


class ProductTap(torch.autograd.Function):
    """Hands the stratum sums of gradient times ``rows`` to a leaf: of what rows were scaled by."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, rows: Tensor, leaf: Tensor, key: Tensor, kind: int, outer: int,
        inner: int, dim: int, reduced: list[int],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(rows, key)
        ctx.place = (kind, outer, inner, leaf.shape, dim, reduced)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, key = ctx.saved_tensors
        return (grad, None, _sums_into(grad * rows, key, *ctx.place), *[None] * 6)


def _sums_into(
    rows: Tensor, key: Tensor, kind: int, outer: int, inner: int, shape: Any, dim: int,
    reduced: list[int],
) -> Tensor:  # fmt: skip
    if reduced:
        rows = rows.sum(reduced, keepdim=True)
    flat = rows.movedim(dim, 0).flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    sums = torch.ops.pinet_fast.traced_sums(flat, key, kind, outer, inner, shape[0])
    out: Tensor = sums.reshape(shape)
    return out
