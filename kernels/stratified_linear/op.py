"""The op ``pinet::stratified_linear_backward``: schema, fake kernel, choice of a backend."""

from __future__ import annotations

import itertools
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


def stratified_linear_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None = None,
    *,
    need_rows: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    precision: str = "ieee",
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of ``y = x W^T + b``, those of W and b by stratum.

    ``grad_rows = grad W``; ``grad_weight[s] = grad[rows of s]^T rows[rows of s]``;
    ``grad_bias[s]`` is the sum of ``grad`` over the rows of stratum s. The strata partition the
    rows, so this has the floating-point operations of one backward, whatever S is.

    Args:
        grad: Gradient of the outputs, [N, D_out]; float32, float64, bfloat16 or float16; any
            strides, expanded tensors included.
        rows: Inputs of the layer, [N, D_in], of the dtype of ``grad``.
        weight: W, [D_out, D_in], of the same dtype; None where ``grad_rows`` is not needed.
        ids: Stratum of every row, int64 [N] in ``0..S-1``; all tensors on one device.
        row_offsets: After sorting by stratum, stratum s owns rows ``row_offsets[s]`` to
            ``row_offsets[s + 1]``: S + 1 ascending ints on the host, from 0 to N.
        order: The stable permutation that sorts ``ids``, int64 [N]; None where they are sorted,
            which saves gathering the rows.
        need_rows: Whether ``grad_rows`` is wanted.
        need_weight: Whether ``grad_weight`` is wanted.
        need_bias: Whether ``grad_bias`` is wanted.
        precision: Of float32 products for ``grad_weight`` on tensor cores: ``"ieee"`` (without
            them), ``"tf32"``, or ``"tf32x3"``, close to ieee; backends without the choice are more
            precise. Products for ``grad_rows`` are torch's, and follow torch's settings.
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``; None lets the library choose.

    Returns:
        ``grad_rows`` [N, D_in] of the dtype of ``rows``; ``grad_weight`` [S, D_out, D_in] and
        ``grad_bias`` [S, D_out] of the same dtype, float32 for bfloat16 and float16. New and
        detached (the op is not differentiable); None where not needed.

    Raises:
        InputError: Shapes, dtypes, devices, offsets or the precision are not as above.
        BackendUnavailableError: The backend asked for cannot serve these inputs.

    Numerics:
        Products are the vendor's (BLAS) in the dtype of the rows; those by stratum on a GPU are our
        own, summed in float32. Bias sums as of ``stratum_sums``. An empty stratum gives exact
        zeros, and no stratum reads another's rows: a NaN stays with its own. The same bits for the
        same inputs and number of threads.

    Cost:
        ``cost(num_rows, wide, deep, num_strata, itemsize)``.
    """
    _check(grad, rows, weight, ids, row_offsets, order, need_rows)
    if precision not in _tl.PRECISIONS:
        raise _tl.precision_error("stratified_linear_backward", precision)
    run = _kernel if is_plain(grad) else torch.ops.pinet.stratified_linear_backward.default
    outs = run(
        grad, rows, weight, ids, row_offsets, order, need_rows, need_weight, need_bias,
        backend or "", precision,
    )  # fmt: skip
    found = iter(outs)
    return (
        next(found) if need_rows else None,
        next(found) if need_weight else None,
        next(found) if need_bias else None,
    )


def cost(num_rows: int, wide: int, deep: int, num_strata: int, itemsize: int) -> tuple[int, int]:
    """Return the arithmetic and the traffic that the op cannot avoid.

    Args:
        num_rows: N.
        wide: D_out.
        deep: D_in.
        num_strata: S.
        itemsize: Bytes per element.

    Returns:
        Floating-point operations and bytes read and written.
    """
    flop = 4 * num_rows * wide * deep + num_rows * wide
    numbers = num_rows * (wide + 2 * deep) + wide * deep + num_strata * wide * (deep + 1)
    return flop, numbers * itemsize


def _check(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
    need_rows: bool,
) -> None:
    if rows.dim() != 2 or rows.dtype not in _DTYPES:
        raise InputError(
            "stratified_linear_backward: rows: expected [N, D_in], float32, float64, bfloat16 or "
            f"float16, got {list(rows.shape)} {rows.dtype}; flatten all but the last dimension, or "
            "convert"
        )
    count, deep = rows.shape
    if grad.dim() != 2 or grad.shape[0] != count or grad.dtype is not rows.dtype:
        raise InputError(
            f"stratified_linear_backward: grad: expected [{count}, D_out] {rows.dtype}, as rows, "
            f"got {list(grad.shape)} {grad.dtype}; reshape or convert it"
        )
    if weight is None:
        if need_rows:
            raise InputError(
                "stratified_linear_backward: weight: grad_rows needs it, got None; give the weight "
                "or need_rows=False"
            )
    elif weight.shape != (grad.shape[1], deep) or weight.dtype is not rows.dtype:
        raise InputError(
            f"stratified_linear_backward: weight: expected [{grad.shape[1]}, {deep}] {rows.dtype}, "
            f"got {list(weight.shape)} {weight.dtype}; W has one row an output"
        )
    for name, index in (("ids", ids), ("order", order)):
        if index is not None and (index.dtype is not torch.int64 or index.shape != (count,)):
            raise InputError(
                f"stratified_linear_backward: {name}: expected int64 [{count}], one a row, got "
                f"{index.dtype} {list(index.shape)}; repeat or convert"
            )
    here = rows.device
    for name, other in (("grad", grad), ("weight", weight), ("ids", ids), ("order", order)):
        if other is not None and other.device != here:
            raise InputError(
                f"stratified_linear_backward: {name}: expected on {here}, as rows, got "
                f"{other.device}; move it"
            )
    is_ascending = True
    for a, b in itertools.pairwise(row_offsets):  # a generator would be a call a stratum
        is_ascending = is_ascending and a <= b
    if len(row_offsets) < 2 or row_offsets[0] != 0 or row_offsets[-1] != count or not is_ascending:
        raise InputError(
            "stratified_linear_backward: row_offsets: expected S + 1 ascending numbers from 0 to "
            f"{count}, got {list(row_offsets)[:12]}; count rows by stratum and accumulate"
        )


def _triton_supports(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
) -> str | None:
    if reason := _tl.device_refusal(rows.device):
        return reason
    if rows.dtype is torch.float64:
        return "no Triton kernel for float64"
    return None


def _run_triton(
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
    # Triton is imported by the first call that needs it.
    from . import _triton

    _triton.run(  # type: ignore[no-untyped-call]
        grad, rows, weight, ids, row_offsets, order, grad_rows, grad_weight, grad_bias, precision
    )


_TRITON = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton,
)
_registry.register(
    "stratified_linear_backward",
    [_cpp.BACKEND, _TRITON, reference.BACKEND],
    lambda grad, rows, weight, ids, row_offsets, order=None: (
        grad, rows, weight, ids, row_offsets, order,
    ),
)  # fmt: skip

# A list, because an op may not return None: what is wanted, in order.
NAMESPACE.define(  # type: ignore[no-untyped-call]
    "stratified_linear_backward(Tensor grad, Tensor rows, Tensor? weight, Tensor ids,"
    " SymInt[] row_offsets, Tensor? order, bool need_rows, bool need_weight, bool need_bias,"
    " str backend, str precision='ieee') -> Tensor[]"
)


def _kernel(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    precision: str = "ieee",
) -> list[Tensor]:
    # The choice is made here, not in the public function: see stratum_gram.
    inputs = (grad, rows, weight, ids, row_offsets, order)
    chosen = _registry.select("stratified_linear_backward", inputs, backend or None)
    outs = _outputs(grad, rows, len(row_offsets) - 1, need_rows, need_weight, need_bias)
    without_graph(chosen.impl, *inputs, *outs, precision)
    _registry.record_call("stratified_linear_backward", chosen.name)
    return [out for out in outs if out is not None]


def _fake(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    precision: str = "ieee",
) -> list[Tensor]:
    outs = _outputs(grad, rows, len(row_offsets) - 1, need_rows, need_weight, need_bias)
    return [out for out in outs if out is not None]


def _outputs(
    grad: Tensor,
    rows: Tensor,
    num_strata: int,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dtype = torch.float32 if rows.dtype in _HALF else rows.dtype
    wide, deep = grad.shape[1], rows.shape[1]
    return (
        rows.new_empty((rows.shape[0], deep)) if need_rows else None,
        rows.new_empty((num_strata, wide, deep), dtype=dtype) if need_weight else None,
        rows.new_empty((num_strata, wide), dtype=dtype) if need_bias else None,
    )


for _key in ("CPU", "CUDA"):
    NAMESPACE.impl("stratified_linear_backward", _kernel, _key)  # type: ignore[no-untyped-call]
NAMESPACE.impl("stratified_linear_backward", _fake, "Meta")  # type: ignore[no-untyped-call]
# Autograd passes the call on and records nothing: the results are detached.
NAMESPACE.impl("stratified_linear_backward", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
