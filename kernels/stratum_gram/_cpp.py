"""C++ backend of ``stratum_gram``; the specification is in ``csrc/stratum_gram.h``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def is_supported(grads: Sequence[Tensor]) -> str | None:
    """Return None if the C++ kernel takes these gradients, else the reason why not."""
    for grad in grads:
        if grad.device.type != "cpu":
            return f"the tensors are on {grad.device.type}, not cpu"
        if grad.dtype is not torch.float32 and grad.dtype is not torch.float64:
            return f"dtype {grad.dtype} is neither float32 nor float64"
    return None


def run(grads: Sequence[Tensor], out: Tensor) -> None:
    """Write the Gram of every parameter into ``out`` [P, S, S] float64."""
    torch.ops.pinet_cpp.stratum_gram.default(grads, out)


BACKEND = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "stratum_gram"),
    is_supported=is_supported,
    impl=run,
)
