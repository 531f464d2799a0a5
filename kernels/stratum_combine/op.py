"""The op ``pinet::stratum_combine``: schema, fake kernel, choice of a backend, public function."""

from __future__ import annotations

import math
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
_MAX_TRITON_STRATA = 16


def stratum_combine(
    grads: Sequence[Tensor],
    weights: Tensor,
    outs: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    accumulate: bool | Sequence[bool] = False,
    rows: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> None:
    """Write the weighted sum of the stratum gradients of every parameter, or add it.

    ``outs[p] (+)= sum_s weights[p, s] * scale * grads[p][s]``.

    Args:
        grads: P >= 1 tensors [S, ...], S >= 1 the same for all; float32, float64, bfloat16 or
            float16; on one device; any strides, expanded tensors included. With ``rows[p]`` given,
            [S, U, ...].
        weights: float64 [S], or [P, S] for weights by parameter.
        outs: P tensors [...] (with ``rows[p]``: [V, ...]) of a dtype as above; any strides without
            overlap; usually ``p.grad``, which may not require grad.
        scale: float64 tensor of one element on the same device, a clip scale for example; None = 1.
        accumulate: False: ``outs[p]`` is written in full, whatever it held; True: the sum is
            added. One value for all, or P.
        rows: The touched rows of parameters whose gradient is compact, int64 [U], ascending and
            distinct; None = all. Other rows become 0, or stay (accumulate).
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``; None lets the library choose.

    Raises:
        InputError: Numbers, shapes, dtypes or devices are not as above.
        RuntimeError: ``rows`` not ascending or out of range (C++ only: on a GPU nobody looks, and
            rows out of range are dropped).
        BackendUnavailableError: The backend asked for cannot serve these inputs.

    Numerics:
        A stratum whose weight is exactly 0 is not read: absent strata may hold NaN. Any other
        weight lets NaN and infinity through. Products and sums in float32 at least, strata in
        ascending order (the reference on a CPU: in the vendor's), ``outs[p]`` added last, one
        rounding at the end. Bitwise deterministic for any number of threads and any layout.

    Cost:
        ``cost(shapes, itemsize)``: each gradient with weight is read once, each output written
        once.
    """
    grads, outs = list(grads), list(outs)
    count = len(grads)
    adding = [accumulate] * count if isinstance(accumulate, bool) else list(accumulate)
    touched: list[Tensor | None] = [None] * count if rows is None else list(rows)
    _check(grads, weights, outs, scale, adding, touched)
    _run(grads, weights, outs, scale, adding, touched, backend or "")


def combine_unchecked(
    grads: list[Tensor], weights: Tensor, outs: list[Tensor], rows: list[Tensor | None]
) -> None:
    """Do what ``stratum_combine`` does, for a caller that made ``outs`` to fit.

    Looking at every tensor takes 30 us of a small model's step.
    """
    _run(grads, weights, outs, None, [False] * len(grads), rows, "")


def _run(
    grads: list[Tensor],
    weights: Tensor,
    outs: list[Tensor],
    scale: Tensor | None,
    adding: list[bool],
    rows: list[Tensor | None],
    backend: str,
) -> None:
    run = _kernel if is_plain(outs[0]) else torch.ops.pinet.stratum_combine.default
    run(grads, weights, outs, scale, adding, rows, backend)


def cost(
    shapes: Sequence[Sequence[int]], itemsize: int, accumulate: bool = False
) -> tuple[int, int]:
    """Return the arithmetic and the traffic that the op cannot avoid, if no weight is 0.

    Args:
        shapes: Shape [S, ...] of every gradient; of compact ones the traffic of untouched rows is
            left out.
        itemsize: Bytes per element.
        accumulate: Whether outputs are added to.

    Returns:
        Floating-point operations and bytes read and written.
    """
    flop = num_bytes = 0
    for strata, *rest in shapes:
        columns = math.prod(rest)
        flop += (2 * strata - 1 + accumulate) * columns
        num_bytes += (strata + 1 + accumulate) * columns * itemsize + strata * 8
    return flop, num_bytes


def _check(
    grads: list[Tensor],
    weights: Tensor,
    outs: list[Tensor],
    scale: Tensor | None,
    accumulate: list[bool],
    rows: list[Tensor | None],
) -> None:
    count = len(grads)
    if not (count >= 1 and count == len(outs) == len(accumulate) == len(rows)):
        raise InputError(
            f"stratum_combine: expected P >= 1 gradients and as many outs, accumulate and rows, "
            f"got {count}, {len(outs)}, {len(accumulate)} and {len(rows)}; pair them up"
        )
    device = grads[0].device
    strata = grads[0].shape[0] if grads[0].dim() else 0
    for p, (grad, out, touched) in enumerate(zip(grads, outs, rows, strict=True)):
        if grad.dim() == 0 or grad.shape[0] == 0 or grad.shape[0] != strata:
            raise InputError(
                f"stratum_combine: grads[{p}]: expected a shape [S, ...] with the S >= 1 of "
                f"grads[0], got {list(grad.shape)}; put the strata in the first dimension"
            )
        if grad.dtype not in _DTYPES or out.dtype not in _DTYPES:
            raise InputError(
                f"stratum_combine: grads[{p}], outs[{p}]: expected float32, float64, bfloat16 or "
                f"float16, got {grad.dtype} and {out.dtype}; convert them"
            )
        if grad.device != device or out.device != device:
            raise InputError(
                f"stratum_combine: grads[{p}], outs[{p}]: expected device {device} as of grads[0], "
                f"got {grad.device} and {out.device}; call the op once per device"
            )
        if out.requires_grad:
            raise InputError(
                f"stratum_combine: outs[{p}]: expected a tensor without requires_grad, got one "
                "that autograd tracks; pass p.grad, not p"
            )
        if touched is not None:
            _check_rows(p, grad, out, touched)
        elif grad.shape[1:] != out.shape:
            raise InputError(
                f"stratum_combine: outs[{p}]: expected {list(grad.shape[1:])}, one slice of "
                f"grads[{p}], got {list(out.shape)}; give rows[{p}] if the gradient is compact"
            )
    if weights.dtype is not torch.float64 or weights.device != device:
        raise InputError(
            f"stratum_combine: weights: expected float64 on {device}, got {weights.dtype} on "
            f"{weights.device}; stratum_solve gives them so"
        )
    if weights.shape != (strata,) and weights.shape != (count, strata):
        raise InputError(
            f"stratum_combine: weights: expected [{strata}] or [{count}, {strata}], got "
            f"{list(weights.shape)}; give absent strata the weight 0"
        )
    if scale is not None and (
        scale.dtype is not torch.float64 or scale.numel() != 1 or scale.device != device
    ):
        raise InputError(
            f"stratum_combine: scale: expected one float64 on {device}, got {scale.dtype} "
            f"{list(scale.shape)} on {scale.device}; multiply the weights by a Python number"
        )


def _check_rows(p: int, grad: Tensor, out: Tensor, rows: Tensor) -> None:
    if rows.dtype is not torch.int64 or rows.dim() != 1 or rows.device != grad.device:
        raise InputError(
            f"stratum_combine: rows[{p}]: expected int64 [U] on {grad.device}, got {rows.dtype} "
            f"{list(rows.shape)} on {rows.device}; convert them"
        )
    if out.dim() == 0 or grad.shape[1:] != (rows.shape[0], *out.shape[1:]):
        raise InputError(
            f"stratum_combine: grads[{p}]: expected [S, U, ...] with U = {rows.shape[0]} of "
            f"rows[{p}] and the widths of outs[{p}] {list(out.shape)}, got {list(grad.shape)}; "
            "leave rows out if the gradient is not compact"
        )


def _triton_supports(grads: Sequence[Tensor], outs: Sequence[Tensor]) -> str | None:
    if reason := _tl.device_refusal(grads[0].device):
        return reason
    if grads[0].shape[0] > _MAX_TRITON_STRATA:
        return f"{grads[0].shape[0]} strata are more than {_MAX_TRITON_STRATA}"
    if any(grad.dtype != grads[0].dtype for grad in grads):
        return "the gradients have several dtypes"
    if any(out.dtype != outs[0].dtype for out in outs):
        return "the outputs have several dtypes"
    return None


def _run_triton(
    grads: Sequence[Tensor],
    weights: Tensor,
    outs: Sequence[Tensor],
    scale: Tensor | None,
    accumulate: Sequence[bool],
    rows: Sequence[Tensor | None],
) -> None:
    # Triton is imported by the first call that needs it.
    from . import _triton

    _triton.run(grads, weights, outs, scale, accumulate, rows)  # type: ignore[no-untyped-call]


_TRITON = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton,
)
_registry.register(
    "stratum_combine",
    [_cpp.BACKEND, _TRITON, reference.BACKEND],
    lambda grads, weights, outs: (list(grads), list(outs)),
)

NAMESPACE.define(  # type: ignore[no-untyped-call]
    "stratum_combine(Tensor[] grads, Tensor weights, Tensor(a!)[] outs, Tensor? scale,"
    " bool[] accumulate, Tensor?[] rows, str backend) -> ()"
)


def _kernel(
    grads: list[Tensor],
    weights: Tensor,
    outs: list[Tensor],
    scale: Tensor | None,
    accumulate: list[bool],
    rows: list[Tensor | None],
    backend: str,
) -> None:
    # The choice is made here, not in the public function: see stratum_gram.
    chosen = _registry.select("stratum_combine", (grads, outs), backend or None)
    by_parameter = weights.detach().expand(len(grads), -1)
    without_graph(chosen.impl, grads, by_parameter, outs, scale, accumulate, rows)
    # Nobody else tells autograd that these tensors changed.
    torch.autograd.graph.increment_version(outs)
    _registry.record_call("stratum_combine", chosen.name)


def _fake(
    grads: list[Tensor],
    weights: Tensor,
    outs: list[Tensor],
    scale: Tensor | None,
    accumulate: list[bool],
    rows: list[Tensor | None],
    backend: str,
) -> None:
    return None


for _key in ("CPU", "CUDA"):
    NAMESPACE.impl("stratum_combine", _kernel, _key)  # type: ignore[no-untyped-call]
NAMESPACE.impl("stratum_combine", _fake, "Meta")  # type: ignore[no-untyped-call]
# Autograd passes the call on and records nothing.
NAMESPACE.impl("stratum_combine", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
