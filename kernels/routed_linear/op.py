"""The op ``pinet::routed_linear``: schema, fakes, autograd, choice of a backend."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from pinet_fast.errors import InputError

from .. import _registry, _tl
from .._library import NAMESPACE, without_graph
from . import _cpp, reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def routed_linear(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None = None,
    *,
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """Apply to every row the linear layer of its head.

    ``out[i] = weight[ids[i]] rows[i] + bias[ids[i]]``. The heads partition the rows, so this has
    the floating-point operations of one layer, whatever H is. Differentiable once, with respect to
    rows, weight and bias.

    Args:
        rows: Inputs, [N, D_in]; float32, float64, bfloat16 or float16; any strides.
        weight: One matrix a head, [H, D_out, D_in], of the dtype of ``rows``; any strides.
        bias: One vector a head, [H, D_out], of the same dtype; None for none.
        ids: Head of every row, int64 [N] in ``0..H-1``; all tensors on one device.
        row_offsets: After sorting by head, head h owns rows ``row_offsets[h]`` to
            ``row_offsets[h + 1]``: H + 1 ascending ints on the host, from 0 to N.
        order: The stable permutation that sorts ``ids``, int64 [N]; None where they are sorted,
            which saves gathering the rows.
        precision: Of float32 products on tensor cores, forward and backward: ``"ieee"`` (without
            them), ``"tf32"``, or ``"tf32x3"``, close to ieee; backends without the choice are more
            precise.
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``; None lets the library choose. The
            backward uses what the forward was asked to use.

    Returns:
        [N, D_out] of the dtype of ``rows``, in the order of ``rows``.

    Raises:
        InputError: Shapes, dtypes, devices, offsets or the precision are not as above.
        BackendUnavailableError: The backend asked for cannot serve these inputs.
        RuntimeError: The gradient of a gradient is asked for.

    Numerics:
        Products are the vendor's (BLAS) in the dtype of the rows, on a GPU our own, summed in
        float32; gradients of biases are summed as by ``stratum_sums``. Heads without rows get zero
        gradients exactly, and no head's rows reach another's gradient: a NaN stays with its own.
        The same bits for the same inputs and number of threads.

    Cost:
        ``cost(num_rows, wide, deep, num_heads, itemsize)``, a forward.
    """
    _check(rows, weight, bias, ids, row_offsets, order)
    if precision not in _tl.PRECISIONS:
        raise _tl.precision_error("routed_linear", precision)
    out: Tensor = torch.ops.pinet.routed_linear.default(
        rows, weight, bias, ids, row_offsets, order, backend or "", precision
    )
    return out


def cost(num_rows: int, wide: int, deep: int, num_heads: int, itemsize: int) -> tuple[int, int]:
    """Return the arithmetic and the traffic that a forward cannot avoid.

    Args:
        num_rows: N.
        wide: D_out.
        deep: D_in.
        num_heads: H; heads without rows need not be read, so this is a bound where some have none.
        itemsize: Bytes per element.

    Returns:
        Floating-point operations and bytes read and written. A backward has twice the operations;
        it reads gradients, rows and weights, and writes gradients of rows and of weights.
    """
    flop = 2 * num_rows * wide * deep + num_rows * wide
    numbers = num_rows * (wide + deep) + num_heads * wide * (deep + 1)
    return flop, numbers * itemsize


def _check(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
) -> None:
    if rows.dim() != 2 or rows.dtype not in _DTYPES:
        raise InputError(
            "routed_linear: rows: expected [N, D_in], float32, float64, bfloat16 or float16, got "
            f"{list(rows.shape)} {rows.dtype}; flatten all but the last dimension, or convert"
        )
    count, deep = rows.shape
    if weight.dim() != 3 or weight.shape[2] != deep or weight.dtype is not rows.dtype:
        raise InputError(
            f"routed_linear: weight: expected [H, D_out, {deep}] {rows.dtype}, as rows, got "
            f"{list(weight.shape)} {weight.dtype}; stack one matrix a head, a row an output"
        )
    heads, wide, _ = weight.shape
    if bias is not None and (bias.shape != (heads, wide) or bias.dtype is not rows.dtype):
        raise InputError(
            f"routed_linear: bias: expected [{heads}, {wide}] {rows.dtype}, as weight, got "
            f"{list(bias.shape)} {bias.dtype}; stack one vector a head, or pass None"
        )
    for name, index in (("ids", ids), ("order", order)):
        if index is not None and (index.dtype is not torch.int64 or index.shape != (count,)):
            raise InputError(
                f"routed_linear: {name}: expected int64 [{count}], one a row, got {index.dtype} "
                f"{list(index.shape)}; repeat or convert"
            )
    here = rows.device
    for name, other in (("weight", weight), ("bias", bias), ("ids", ids), ("order", order)):
        if other is not None and other.device != here:
            raise InputError(
                f"routed_linear: {name}: expected on {here}, as rows, got {other.device}; move it"
            )
    is_ascending = True
    for a, b in itertools.pairwise(row_offsets):  # a generator would be a call a stratum
        is_ascending = is_ascending and a <= b
    if (
        len(row_offsets) != heads + 1
        or row_offsets[0] != 0
        or row_offsets[-1] != count
        or not is_ascending
    ):
        raise InputError(
            f"routed_linear: row_offsets: expected {heads + 1} ascending numbers from 0 to {count},"
            f" got {list(row_offsets)[:12]}; count rows by head and accumulate"
        )


def _triton_supports(first: Tensor, *others: object) -> str | None:
    if reason := _tl.device_refusal(first.device):
        return reason
    if first.dtype is torch.float64:
        return "no Triton kernel for float64"
    return None


def _run_triton_forward(*arguments: object) -> None:
    # Triton is imported by the first call that needs it.
    from . import _triton

    _triton.run_forward(*arguments)  # type: ignore[no-untyped-call]


def _run_triton_backward(*arguments: object) -> None:
    from . import _triton

    _triton.run_backward(*arguments)  # type: ignore[no-untyped-call]


_TRITON_FORWARD = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton_forward,
)
_TRITON_BACKWARD = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton_backward,
)
_registry.register(
    "routed_linear",
    [_cpp.FORWARD, _TRITON_FORWARD, reference.FORWARD],
    lambda rows, weight, bias, ids, row_offsets, order=None: (
        rows, weight, bias, ids, row_offsets, order,
    ),
)  # fmt: skip
_registry.register("routed_linear_backward", [_cpp.BACKWARD, _TRITON_BACKWARD, reference.BACKWARD])

NAMESPACE.define(  # type: ignore[no-untyped-call]
    "routed_linear(Tensor rows, Tensor weight, Tensor? bias, Tensor ids, SymInt[] row_offsets,"
    " Tensor? order, str backend, str precision='ieee') -> Tensor"
)
# A list, because an op may not return None: what is wanted, in order.
NAMESPACE.define(  # type: ignore[no-untyped-call]
    "routed_linear_backward(Tensor grad, Tensor rows, Tensor? weight, Tensor ids,"
    " SymInt[] row_offsets, Tensor? order, bool need_rows, bool need_weight, bool need_bias,"
    " str backend, str precision='ieee') -> Tensor[]"
)


def _kernel(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
    backend: str,
    precision: str = "ieee",
) -> Tensor:
    # The choice is made here, not in the public function: see stratum_gram.
    inputs = (rows, weight, bias, ids, row_offsets, order)
    chosen = _registry.select("routed_linear", inputs, backend or None)
    out = rows.new_empty((rows.shape[0], weight.shape[1]))
    without_graph(chosen.impl, *inputs, out, precision)
    _registry.record_call("routed_linear", chosen.name)
    return out


def _fake(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
    backend: str,
    precision: str = "ieee",
) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


def _backward_kernel(
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
    inputs = (grad, rows, weight, ids, row_offsets, order)
    chosen = _registry.select("routed_linear_backward", inputs, backend or None)
    outs = _gradients(grad, rows, len(row_offsets) - 1, need_rows, need_weight, need_bias)
    without_graph(chosen.impl, *inputs, *outs, precision)
    _registry.record_call("routed_linear_backward", chosen.name)
    return [out for out in outs if out is not None]


def _backward_fake(
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
    outs = _gradients(grad, rows, len(row_offsets) - 1, need_rows, need_weight, need_bias)
    return [out for out in outs if out is not None]


def _gradients(
    grad: Tensor, rows: Tensor, heads: int, need_rows: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wide, deep = grad.shape[1], rows.shape[1]
    return (
        rows.new_empty((rows.shape[0], deep)) if need_rows else None,
        rows.new_empty((heads, wide, deep)) if need_weight else None,
        rows.new_empty((heads, wide)) if need_bias else None,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, bias, ids, row_offsets, order, ctx.backend, ctx.precision = inputs
    ctx.save_for_backward(rows, weight, ids, order)
    ctx.row_offsets, ctx.has_bias = row_offsets, bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, ids, order = ctx.saved_tensors
    need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_bias = need_bias and ctx.has_bias
    found = iter(
        torch.ops.pinet.routed_linear_backward.default(
            grad, rows, weight if need_rows else None, ids, ctx.row_offsets, order,
            need_rows, need_weight, need_bias, ctx.backend, ctx.precision,
        )
    )  # fmt: skip
    return (
        next(found) if need_rows else None,
        next(found) if need_weight else None,
        next(found) if need_bias else None,
        *[None] * 5,
    )


def _refuse(ctx: Any, grads: list[Tensor]) -> None:
    raise RuntimeError(
        "routed_linear: the gradient of a gradient is not implemented; call F.linear head by head "
        "where it is needed"
    )


for _op, _impl, _meta in (
    ("routed_linear", _kernel, _fake),
    ("routed_linear_backward", _backward_kernel, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        NAMESPACE.impl(_op, _impl, _key)  # type: ignore[no-untyped-call]
    NAMESPACE.impl(_op, _meta, "Meta")  # type: ignore[no-untyped-call]
torch.library.register_autograd(
    "pinet::routed_linear", _backward, setup_context=_save, lib=NAMESPACE
)
torch.library.register_autograd("pinet::routed_linear_backward", _refuse, lib=NAMESPACE)
