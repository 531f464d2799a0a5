"""The ops ``pinet::stratified_embedding_*``: schemas, fakes, backends, public functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.errors import InputError

from .. import _registry, _tl
from .._library import NAMESPACE, is_plain, without_graph
from . import _cpp, reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def stratified_embedding_reduce(
    ids: Sequence[Tensor],
    strata: Sequence[Tensor],
    grads: Sequence[Tensor],
    num_strata: int,
    num_rows: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the gradients of lookups in one table by (stratum, item), over touched items alone.

    ``values[s, u] = sum of grads[k][n] over strata[k][n] == s, ids[k][n] == rows[u]``.

    Args:
        ids: K >= 1 tensors int64 [N_k], the items looked up; any order, any stride.
        strata: K tensors int64 [N_k], the stratum of every lookup.
        grads: K tensors [N_k, ...] of one shape of a row (also none) and one dtype: float32,
            float64, bfloat16 or float16; on one device; any strides, expanded tensors included.
        num_strata: S >= 1.
        num_rows: V, the rows of the table.
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``; None lets the library choose.

    Returns:
        rows: int64 [U], the distinct ids, ascending.
        values: [S, U, ...] of the dtype of ``grads``, 0 where a stratum did not touch a row.
        touched: bool [S, U].
        All new and detached: the op is not differentiable.

    Raises:
        InputError: Numbers, shapes, dtypes or devices are not as above, or an id or a stratum is
            out of range.
        BackendUnavailableError: The backend asked for cannot serve these inputs.

    Numerics:
        Summed in the order of the lists and their entries, in float32 at least; on a GPU the
        entries of a popular item are summed in parts. Bitwise deterministic, for any number of
        threads and any layout. A NaN or an infinity stays in its
        (stratum, item).

    Cost:
        ``cost(...)``: each gradient is read once, each sum written once; never [S, V, ...].
    """
    ids, strata, grads = list(ids), list(strata), list(grads)
    if not grads:
        raise InputError(
            "stratified_embedding_reduce: grads: expected at least one tensor, got none; "
            "leave the call out when nothing was looked up"
        )
    if num_strata < 1 or num_rows < 0:
        raise InputError(
            "stratified_embedding_reduce: expected num_strata >= 1 and num_rows >= 0, got "
            f"{num_strata} and {num_rows}; give the sizes of the leaf [S, V, ...]"
        )
    _check("stratified_embedding_reduce", ids, strata, grads, grads[0], grads[0].shape[1:])
    run = (
        _reduce_kernel
        if is_plain(grads[0])
        else torch.ops.pinet.stratified_embedding_reduce.default
    )
    found: tuple[Tensor, Tensor, Tensor] = run(
        ids, strata, grads, num_strata, num_rows, backend or ""
    )
    return found


def stratified_embedding_add(
    dense: Tensor,
    ids: Sequence[Tensor],
    strata: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> None:
    """Add the gradients of lookups, summed by (stratum, item), to the dense stratum gradients.

    ``dense[s, v] += sum of grads[k][n] over strata[k][n] == s, ids[k][n] == v``.

    Args:
        dense: [S, V, ...] of the dtype of ``grads``, any strides without overlap; may not require
            grad.
        ids: K tensors int64 [N_k], as of ``stratified_embedding_reduce``; K = 0 adds nothing.
        strata: K tensors int64 [N_k].
        grads: K tensors [N_k, ...].
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``; None lets the library choose.

    Raises:
        InputError: As of ``stratified_embedding_reduce``; ``dense`` is then as it was. On a GPU
            nobody waits to see whether ids and strata are in range: entries that are not are left
            out.
        BackendUnavailableError: The backend asked for cannot serve these inputs.

    Numerics:
        The sums of ``stratified_embedding_reduce``, each added once. What no lookup touched stays,
        bit by bit.
    """
    ids, strata, grads = list(ids), list(strata), list(grads)
    if dense.dim() < 2 or dense.requires_grad or _overlaps(dense):
        raise InputError(
            "stratified_embedding_add: dense: expected [S, V, ...] without overlap that autograd "
            f"does not track, got {list(dense.shape)} with strides {list(dense.stride())}, "
            f"requires_grad={dense.requires_grad}; pass a gradient, cloned if it is expanded"
        )
    _check("stratified_embedding_add", ids, strata, grads, dense, dense.shape[2:])
    run = _add_kernel if is_plain(dense) else torch.ops.pinet.stratified_embedding_add.default
    run(dense, ids, strata, grads, backend or "")


def cost(
    num_entries: int, num_touched: int, num_strata: int, width: int, itemsize: int
) -> tuple[int, int]:
    """Return the arithmetic and the traffic that ``stratified_embedding_reduce`` cannot avoid.

    Args:
        num_entries: N, lookups in all lists together.
        num_touched: U, distinct ids.
        num_strata: S.
        width: Elements of a row.
        itemsize: Bytes per element.

    Returns:
        Floating-point operations, and bytes read and written: ids, strata and gradients once, rows,
        values and marks once.
    """
    cells = num_strata * num_touched
    num_bytes = num_entries * (16 + width * itemsize) + cells * (1 + width * itemsize)
    return num_entries * width, num_bytes + 8 * num_touched


def _overlaps(dense: Tensor) -> bool:
    return any(n > 1 and step == 0 for n, step in zip(dense.shape, dense.stride(), strict=True))


def _check(
    op: str,
    ids: list[Tensor],
    strata: list[Tensor],
    grads: list[Tensor],
    like: Tensor,
    row_shape: Sequence[int],
) -> None:
    if not len(ids) == len(strata) == len(grads):
        raise InputError(
            f"{op}: expected as many ids and strata as grads, got {len(ids)}, {len(strata)} and "
            f"{len(grads)}; give one of each per lookup"
        )
    if like.dtype not in _DTYPES:
        raise InputError(
            f"{op}: expected float32, float64, bfloat16 or float16, got {like.dtype}; convert it"
        )
    device = like.device
    for k, (items, owners, grad) in enumerate(zip(ids, strata, grads, strict=True)):
        if grad.dim() == 0 or grad.shape[1:] != row_shape or grad.dtype != like.dtype:
            raise InputError(
                f"{op}: grads[{k}]: expected {like.dtype} [N, {', '.join(map(str, row_shape))}], "
                f"got {grad.dtype} {list(grad.shape)}; lookups in one table have rows of one kind"
            )
        for name, index in (("ids", items), ("strata", owners)):
            if index.dtype is not torch.int64 or index.shape != grad.shape[:1]:
                raise InputError(
                    f"{op}: {name}[{k}]: expected int64 [{grad.shape[0]}], one per entry of "
                    f"grads[{k}], got {index.dtype} {list(index.shape)}; flatten and convert it"
                )
        if not grad.device == items.device == owners.device == device:
            raise InputError(
                f"{op}: ids[{k}], strata[{k}], grads[{k}]: expected device {device}, got "
                f"{items.device}, {owners.device} and {grad.device}; move them"
            )


def _triton_supports(like: Tensor) -> str | None:
    return _tl.device_refusal(like.device)


def _run_triton_reduce(
    ids: Sequence[Tensor],
    strata: Sequence[Tensor],
    grads: Sequence[Tensor],
    num_strata: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # Triton is imported by the first call that needs it.
    from . import _triton

    return _triton.run_reduce(  # type: ignore[no-any-return, no-untyped-call]
        ids, strata, grads, num_strata, num_rows
    )


def _run_triton_add(
    dense: Tensor, ids: Sequence[Tensor], strata: Sequence[Tensor], grads: Sequence[Tensor]
) -> None:
    from . import _triton

    _triton.run_add(dense, ids, strata, grads)  # type: ignore[no-untyped-call]


_TRITON_REDUCE = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton_reduce,
)
_TRITON_ADD = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton_add,
)
_registry.register(
    "stratified_embedding_reduce",
    [_cpp.REDUCE, _TRITON_REDUCE, reference.REDUCE],
    lambda ids, strata, grads, num_strata, num_rows: (grads[0],),
)
_registry.register(
    "stratified_embedding_add",
    [_cpp.ADD, _TRITON_ADD, reference.ADD],
    lambda dense, ids, strata, grads: (dense,),
)

NAMESPACE.define(  # type: ignore[no-untyped-call]
    "stratified_embedding_reduce(Tensor[] ids, Tensor[] strata, Tensor[] grads,"
    " SymInt num_strata, SymInt num_rows, str backend) -> (Tensor, Tensor, Tensor)"
)
NAMESPACE.define(  # type: ignore[no-untyped-call]
    "stratified_embedding_add(Tensor(a!) dense, Tensor[] ids, Tensor[] strata, Tensor[] grads,"
    " str backend) -> ()"
)


def _reduce_kernel(
    ids: list[Tensor],
    strata: list[Tensor],
    grads: list[Tensor],
    num_strata: int,
    num_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # The choice is made here, not in the public function: see stratum_gram.
    chosen = _registry.select("stratified_embedding_reduce", (grads[0],), backend or None)
    result = without_graph(chosen.impl, ids, strata, grads, num_strata, num_rows)
    _registry.record_call("stratified_embedding_reduce", chosen.name)
    return result  # type: ignore[no-any-return]


def _reduce_fake(
    ids: list[Tensor],
    strata: list[Tensor],
    grads: list[Tensor],
    num_strata: int,
    num_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # How many rows are touched depends on the ids: a size that only the run knows.
    num_touched = torch.library.get_ctx().new_dynamic_size()
    return (
        ids[0].new_empty((num_touched,)),
        grads[0].new_empty((num_strata, num_touched, *grads[0].shape[1:])),
        grads[0].new_empty((num_strata, num_touched), dtype=torch.bool),
    )


def _add_kernel(
    dense: Tensor, ids: list[Tensor], strata: list[Tensor], grads: list[Tensor], backend: str
) -> None:
    chosen = _registry.select("stratified_embedding_add", (dense,), backend or None)
    without_graph(chosen.impl, dense, ids, strata, grads)
    # Nobody else tells autograd that this tensor changed.
    torch.autograd.graph.increment_version(dense)
    _registry.record_call("stratified_embedding_add", chosen.name)


def _add_fake(
    dense: Tensor, ids: list[Tensor], strata: list[Tensor], grads: list[Tensor], backend: str
) -> None:
    return None


for _op, _kernel in (
    ("stratified_embedding_reduce", _reduce_kernel),
    ("stratified_embedding_add", _add_kernel),
):
    for _key in ("CPU", "CUDA"):
        NAMESPACE.impl(_op, _kernel, _key)  # type: ignore[no-untyped-call]
    # Autograd passes the call on and records nothing: results are detached.
    NAMESPACE.impl(_op, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("pinet::stratified_embedding_reduce", _reduce_fake, lib=NAMESPACE)
torch.library.register_fake("pinet::stratified_embedding_add", _add_fake, lib=NAMESPACE)
