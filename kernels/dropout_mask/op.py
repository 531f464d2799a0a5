"""The op ``pinet::dropout_mask``: schema, fake kernel, choice of a backend, public function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.errors import InputError

from .. import _registry
from .._library import NAMESPACE, is_plain, without_graph
from . import _cpp, reference

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dropout_mask(
    like: Tensor,
    rate: float,
    *,
    count: int = 1,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return what dropout multiplies by: zero with probability ``rate``, else ``1 / (1 - rate)``.

    Args:
        like: A tensor of the shape, dtype and device of a mask; float32, float64, bfloat16 or
            float16. Its values are not read.
        rate: Probability of zero, 0 < rate < 1; rounded to a multiple of 1 / 65536, between
            1 / 65536 and 65535 / 65536. The scale is that of the rounded rate, so that the mean is
            exact up to the rounding of the dtype.
        count: How many masks are drawn, >= 1.
        seed: Decides which elements are zero, an int64; None draws one from torch's generator.
        backend: ``"reference"`` or ``"cpp"``; None lets the library choose.

    Returns:
        New tensor [count, *like.shape], contiguous, detached.

    Raises:
        InputError: Arguments that are not as above.
        BackendUnavailableError: The backend asked for cannot serve these inputs.

    Numerics:
        The same bits for the same seed, shape and backend, whatever the number of threads.
        Backends have generators of their own.

    Cost:
        ``cost(count, itemsize)``: each element is written once.
    """
    if like.dtype not in _DTYPES:
        raise InputError(
            "dropout_mask: like: expected float32, float64, bfloat16 or float16, got "
            f"{like.dtype}; give a tensor of the dtype the mask is multiplied with"
        )
    if not 0.0 < rate < 1.0:
        raise InputError(
            f"dropout_mask: rate: expected 0 < rate < 1, got {rate}; without dropout no mask is "
            "needed"
        )
    if count < 1:
        raise InputError(
            f"dropout_mask: count: expected at least 1, got {count}; skip the call instead"
        )
    if seed is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, (), device="cpu"))
    run = _kernel if is_plain(like) else torch.ops.pinet.dropout_mask.default
    mask: Tensor = run(like, rate, count, seed, backend or "")
    return mask


def cost(count: int, itemsize: int) -> tuple[int, int]:
    """Return the arithmetic and the traffic that the op cannot avoid.

    Args:
        count: Elements.
        itemsize: Bytes per element.

    Returns:
        Operations on integers of 64 bits (nine for four elements) and bytes written.
    """
    return 9 * count // 4, count * itemsize


_registry.register(
    "dropout_mask",
    [_cpp.BACKEND, reference.BACKEND],
    lambda like, rate, **options: (like,),
)

NAMESPACE.define(  # type: ignore[no-untyped-call]
    "dropout_mask(Tensor like, float rate, SymInt count, int seed, str backend) -> Tensor"
)


def _kernel(like: Tensor, rate: float, count: int, seed: int, backend: str) -> Tensor:
    # The choice is made here, not in the public function: see stratum_gram.
    chosen = _registry.select("dropout_mask", (like,), backend or None)
    mask = _fake(like, rate, count, seed, backend)
    without_graph(chosen.impl, rate, seed, mask)
    _registry.record_call("dropout_mask", chosen.name)
    return mask


def _fake(like: Tensor, rate: float, count: int, seed: int, backend: str) -> Tensor:
    return like.new_empty((count, *like.shape))


for _key in ("CPU", "CUDA"):
    NAMESPACE.impl("dropout_mask", _kernel, _key)  # type: ignore[no-untyped-call]
NAMESPACE.impl("dropout_mask", _fake, "Meta")  # type: ignore[no-untyped-call]
# Autograd passes the call on and records nothing: the result is detached.
NAMESPACE.impl("dropout_mask", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
