"""C++ backend of ``stratum_combine``; the specification is in ``csrc/stratum_combine.h``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def is_supported(grads: Sequence[Tensor], outs: Sequence[Tensor]) -> str | None:
    """Return None if the C++ kernel takes these tensors, else the reason why not."""
    for grad, out in zip(grads, outs, strict=True):
        if grad.device.type != "cpu":
            return f"the tensors are on {grad.device.type}, not cpu"
        if grad.dtype is not torch.float32 and grad.dtype is not torch.float64:
            return f"dtype {grad.dtype} is neither float32 nor float64"
        if out.dtype is not grad.dtype:
            return f"an output is {out.dtype}, its gradient {grad.dtype}"
    return None


def run(
    grads: Sequence[Tensor],
    weights: Tensor,
    outs: Sequence[Tensor],
    scale: Tensor | None,
    accumulate: Sequence[bool],
    rows: Sequence[Tensor | None],
) -> None:
    """Write or add the weighted sums into ``outs``; arguments as of the reference."""
    touched = [row.contiguous() for row in rows if row is not None]
    given = iter(range(len(touched)))
    row_of = [-1 if row is None else next(given) for row in rows]
    if weights.stride(0) == 0:  # one row of weights for all
        weights = weights[:1]
    torch.ops.pinet_cpp.stratum_combine.default(
        grads, weights.contiguous(), scale, outs, [int(add) for add in accumulate], touched, row_of
    )


BACKEND = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "stratum_combine"),
    is_supported=is_supported,
    impl=run,
)
