"""The op ``pinet::stratified_norm_backward``: schema, fake kernel, choice of a backend."""

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
_HALF = (torch.bfloat16, torch.float16)
_MAX_TRITON_STRATA = 64
_MAX_TRITON_WIDTH = 16384  # a row is held in registers
_MAX_TRITON_WIDTH_OF_DOUBLES = 4096


def stratified_norm_backward(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    num_strata: int,
    *,
    need_rows: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    row_offsets: Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of LayerNorm over the last dimension, those of parameters by stratum.

    With ``xhat = (rows - mean) * rstd`` and ``g = grad * weight``: ``grad_rows = rstd * (g - avg(g)
    - xhat * avg(g * xhat))``, averages over D; ``grad_weight[s]`` and ``grad_bias[s]`` are the sums
    of ``grad * xhat`` and of ``grad`` over the rows of stratum s.

    Args:
        grad: Gradient of the outputs, [N, D]; float32, float64, bfloat16 or float16; any strides,
            expanded tensors included.
        rows: Inputs of the normalisation, [N, D], as ``grad``.
        mean: Mean of every row, [N], as ``torch.native_layer_norm`` gives it, flattened.
        rstd: Inverse standard deviation of every row, [N].
        weight: Scale [D], or None for ones.
        ids: Stratum of every row, int64 [N] in ``0..num_strata-1``, in any order; all on one
            device.
        num_strata: S >= 1.
        need_rows: Whether ``grad_rows`` is wanted.
        need_weight: Whether ``grad_weight`` is wanted.
        need_bias: Whether ``grad_bias`` is wanted.
        row_offsets: Where strata start, S + 1 ascending ints on the host from 0 to N, if the caller
            knows that the ids are sorted: a backend that would look for it believes them. None =
            not known.
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``; None lets the library choose.

    Returns:
        ``grad_rows`` [N, D] of the dtype of ``rows``; ``grad_weight`` and ``grad_bias`` [S, D] of
        the same dtype, float32 for bfloat16 and float16. New and detached (the op is not
        differentiable); None where not needed.

    Raises:
        InputError: Shapes, dtypes or devices are not as above.
        RuntimeError: An id is out of range and a gradient by stratum is wanted (C++ only: elsewhere
            nobody looks, and its row counts in no stratum).
        BackendUnavailableError: The backend asked for cannot serve these inputs.

    Numerics:
        Rows in float32 at least; sums over rows in float32 over short runs, all above in float64,
        one rounding at the end. An empty stratum gives exact zeros. A NaN or an infinity stays in
        its row and in the columns of its stratum. Bitwise deterministic for any number of threads.

    Cost:
        ``cost(num_rows, width, num_strata, itemsize)``: each row is read once.
    """
    _check(grad, rows, mean, rstd, weight, ids, num_strata)
    if row_offsets is not None:
        _check_offsets(row_offsets, rows.shape[0], num_strata)
    run = _kernel if is_plain(grad) else torch.ops.pinet.stratified_norm_backward.default
    found = iter(
        run(
            grad, rows, mean, rstd, weight, ids, num_strata, need_rows, need_weight, need_bias,
            backend or "", row_offsets,
        )
    )  # fmt: skip
    return (
        next(found) if need_rows else None,
        next(found) if need_weight else None,
        next(found) if need_bias else None,
    )


def cost(num_rows: int, width: int, num_strata: int, itemsize: int) -> tuple[int, int]:
    """Return the arithmetic and the traffic that the op cannot avoid, all gradients wanted.

    Args:
        num_rows: N.
        width: D.
        num_strata: S.
        itemsize: Bytes per element.

    Returns:
        Floating-point operations and bytes read and written.
    """
    # xhat 2, g 1, their averages 3, grad_rows 5, grad_weight 2, grad_bias 1.
    flop = 14 * num_rows * width
    numbers = 3 * num_rows * width + 2 * num_rows + (2 * num_strata + 1) * width
    return flop, numbers * itemsize + num_rows * 8


def _check(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    num_strata: int,
) -> None:
    if rows.dim() != 2 or rows.dtype not in _DTYPES:
        raise InputError(
            "stratified_norm_backward: rows: expected [N, D], float32, float64, bfloat16 or "
            f"float16, got {list(rows.shape)} {rows.dtype}; flatten the normalised dimensions to "
            "one and all others to one, or convert"
        )
    count, width = rows.shape
    shapes = (("grad", grad, (count, width)), ("mean", mean, (count,)), ("rstd", rstd, (count,)))
    for name, other, shape in (*shapes, ("weight", weight, (width,))):
        if other is not None and (
            other.shape != shape or other.dtype not in _DTYPES or other.device != rows.device
        ):
            raise InputError(
                f"stratified_norm_backward: {name}: expected {list(shape)} on {rows.device} of a "
                f"floating dtype, to go with rows, got {list(other.shape)} {other.dtype} on "
                f"{other.device}; reshape or convert it"
            )
    if ids.dtype is not torch.int64 or ids.shape != (count,) or ids.device != rows.device:
        raise InputError(
            f"stratified_norm_backward: ids: expected int64 [{count}] on {rows.device}, one "
            f"stratum a row, got {ids.dtype} {list(ids.shape)} on {ids.device}; repeat or convert "
            "them"
        )
    if num_strata < 1:
        raise InputError(
            f"stratified_norm_backward: num_strata: expected at least 1, got {num_strata}; count "
            "empty strata"
        )


def _check_offsets(row_offsets: Sequence[int], count: int, num_strata: int) -> None:
    given = list(row_offsets)
    is_right = len(given) == num_strata + 1 and given[0] == 0 and given[-1] == count
    if not is_right or given != sorted(given):
        raise InputError(
            f"stratified_norm_backward: row_offsets: expected {num_strata + 1} ascending numbers "
            f"from 0 to {count}, got {given[:12]}; count the rows of sorted strata, or leave them "
            "out"
        )


def _triton_supports(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    num_strata: int,
) -> str | None:
    if reason := _tl.device_refusal(rows.device):
        return reason
    if num_strata > _MAX_TRITON_STRATA:
        return f"{num_strata} strata are more than {_MAX_TRITON_STRATA}"
    is_double = any(
        x is not None and x.dtype is torch.float64 for x in (grad, rows, mean, rstd, weight)
    )
    longest = _MAX_TRITON_WIDTH_OF_DOUBLES if is_double else _MAX_TRITON_WIDTH
    if rows.shape[1] > longest:
        return f"rows of {rows.shape[1]} numbers are longer than {longest}"
    return None


def _run_triton(
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
) -> None:
    # Triton is imported by the first call that needs it.
    from . import _triton

    _triton.run(  # type: ignore[no-untyped-call]
        grad, rows, mean, rstd, weight, ids, grad_rows, grad_weight, grad_bias
    )


_TRITON = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton,
)
_registry.register(
    "stratified_norm_backward",
    [_cpp.BACKEND, _TRITON, reference.BACKEND],
    lambda grad, rows, mean, rstd, weight, ids, num_strata: (
        grad, rows, mean, rstd, weight, ids, num_strata,
    ),
)  # fmt: skip

# A list, because an op may not return None: what is wanted, in order.
NAMESPACE.define(  # type: ignore[no-untyped-call]
    "stratified_norm_backward(Tensor grad, Tensor rows, Tensor mean, Tensor rstd, Tensor? weight,"
    " Tensor ids, SymInt num_strata, bool need_rows, bool need_weight, bool need_bias, str backend,"
    " SymInt[]? row_offsets=None) -> Tensor[]"
)


def _kernel(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    num_strata: int,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    row_offsets: Sequence[int] | None = None,
) -> list[Tensor]:
    # The choice is made here, not in the public function: see stratum_gram.
    inputs = (grad, rows, mean, rstd, weight, ids)
    chosen = _registry.select("stratified_norm_backward", (*inputs, num_strata), backend or None)
    outs = _outputs(rows, num_strata, need_rows, need_weight, need_bias)
    made = without_graph(chosen.impl, *inputs, *outs, row_offsets)
    if made is not None:  # a gradient of the rows that a backend has made itself
        outs = (made, *outs[1:])
    _registry.record_call("stratified_norm_backward", chosen.name)
    return [out for out in outs if out is not None]


def _fake(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    num_strata: int,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    row_offsets: Sequence[int] | None = None,
) -> list[Tensor]:
    outs = _outputs(rows, num_strata, need_rows, need_weight, need_bias)
    return [out for out in outs if out is not None]


def _outputs(
    rows: Tensor, num_strata: int, need_rows: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dtype = torch.float32 if rows.dtype in _HALF else rows.dtype
    shape = (num_strata, rows.shape[1])
    return (
        torch.empty_like(rows, memory_format=torch.contiguous_format) if need_rows else None,
        rows.new_empty(shape, dtype=dtype) if need_weight else None,
        rows.new_empty(shape, dtype=dtype) if need_bias else None,
    )


for _key in ("CPU", "CUDA"):
    NAMESPACE.impl("stratified_norm_backward", _kernel, _key)  # type: ignore[no-untyped-call]
NAMESPACE.impl("stratified_norm_backward", _fake, "Meta")  # type: ignore[no-untyped-call]
# Autograd passes the call on and records nothing: the results are detached.
NAMESPACE.impl("stratified_norm_backward", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
