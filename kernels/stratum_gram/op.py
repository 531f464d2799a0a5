"""The op ``pinet::stratum_gram``: schema, fake kernel, choice of a backend, public function."""

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


def stratum_gram(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Compute the inner products of the stratum gradients of every parameter.

    ``out[p, s, t] = sum_c grads[p][s, c] * grads[p][t, c]``; the Gram of the whole model is
    ``out.sum(0)``.

    Args:
        grads: P >= 1 tensors of shape [S, ...], S >= 1 the same for all; float32, float64, bfloat16
            or float16; on one device; any strides, expanded tensors included; slices may be empty.
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``; None lets the library choose.

    Returns:
        New tensor [P, S, S], float64, on the device of ``grads``, exactly symmetric, detached: the
        op is not differentiable.

    Raises:
        InputError: ``grads`` is empty, or shapes, dtypes or devices are not as above.
        BackendUnavailableError: The backend asked for cannot serve these inputs.

    Numerics:
        Float32 products are summed in float32 over short runs, runs in float64; float64 stays
        float64. Every backend is bitwise deterministic, for
        any number of threads. A NaN or an infinity reaches the row and the column of its stratum,
        nothing else. Empty slices give zeros.

    Cost:
        ``cost(shapes, itemsize)``: each gradient is read once.
    """
    grads = list(grads)
    _check(grads)
    is_direct = len(grads) > 0 and is_plain(grads[0])
    run = _kernel if is_direct else torch.ops.pinet.stratum_gram.default
    gram: Tensor = run(grads, backend or "")
    return gram


def cost(shapes: Sequence[Sequence[int]], itemsize: int) -> tuple[int, int]:
    """Return the arithmetic and the traffic that the op cannot avoid.

    Args:
        shapes: Shape [S, ...] of every gradient.
        itemsize: Bytes per element.

    Returns:
        Floating-point operations (symmetry used) and bytes read and written.
    """
    flop = num_bytes = 0
    for strata, *rest in shapes:
        columns = math.prod(rest)
        flop += strata * (strata + 1) * columns
        num_bytes += strata * columns * itemsize + strata * strata * 8
    return flop, num_bytes


def _check(grads: list[Tensor]) -> None:
    if not grads:
        raise InputError(
            "stratum_gram: grads: expected at least one tensor, got none; "
            "leave the call out when no parameter has stratum gradients"
        )
    first = grads[0]
    for p, grad in enumerate(grads):
        if grad.dim() == 0 or grad.shape[0] == 0:
            raise InputError(
                f"stratum_gram: grads[{p}]: expected a shape [S, ...] with S >= 1, "
                f"got {list(grad.shape)}; put the strata in the first dimension"
            )
        if grad.shape[0] != first.shape[0]:
            raise InputError(
                f"stratum_gram: grads[{p}]: expected {first.shape[0]} strata as in grads[0], "
                f"got {grad.shape[0]}; give absent strata zero slices"
            )
        if grad.dtype not in _DTYPES:
            raise InputError(
                f"stratum_gram: grads[{p}]: expected float32, float64, bfloat16 or float16, "
                f"got {grad.dtype}; convert it"
            )
        if grad.device != first.device:
            raise InputError(
                f"stratum_gram: grads[{p}]: expected device {first.device} as of grads[0], "
                f"got {grad.device}; call the op once per device"
            )


def _triton_supports(grads: Sequence[Tensor]) -> str | None:
    if reason := _tl.device_refusal(grads[0].device):
        return reason
    if grads[0].shape[0] > _MAX_TRITON_STRATA:
        return f"{grads[0].shape[0]} strata are more than {_MAX_TRITON_STRATA}"
    if any(grad.dtype != grads[0].dtype for grad in grads):
        return "the gradients have several dtypes"
    return None


def _run_triton(grads: Sequence[Tensor], out: Tensor) -> None:
    # Triton is imported by the first call that needs it.
    from . import _triton

    _triton.run(grads, out)  # type: ignore[no-untyped-call]


_TRITON = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton,
)
_registry.register(
    "stratum_gram", [_cpp.BACKEND, _TRITON, reference.BACKEND], lambda grads: (list(grads),)
)

NAMESPACE.define("stratum_gram(Tensor[] grads, str backend) -> Tensor")  # type: ignore[no-untyped-call]


def _kernel(grads: list[Tensor], backend: str) -> Tensor:
    # The choice is made here, not in the public function, so that a compiled graph holds one call
    # and neither the environment nor this machine's backends.
    chosen = _registry.select("stratum_gram", (grads,), backend or None)
    out = _empty_gram(grads)
    without_graph(chosen.impl, grads, out)
    _registry.record_call("stratum_gram", chosen.name)
    return out


def _fake(grads: list[Tensor], backend: str) -> Tensor:
    return _empty_gram(grads)


def _empty_gram(grads: Sequence[Tensor]) -> Tensor:
    strata = grads[0].shape[0]
    return grads[0].new_empty((len(grads), strata, strata), dtype=torch.float64)


for _key in ("CPU", "CUDA"):
    NAMESPACE.impl("stratum_gram", _kernel, _key)  # type: ignore[no-untyped-call]
NAMESPACE.impl("stratum_gram", _fake, "Meta")  # type: ignore[no-untyped-call]
# Autograd passes the call on and records nothing: the result is detached.
NAMESPACE.impl("stratum_gram", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
