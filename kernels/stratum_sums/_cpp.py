"""C++ backend of ``stratum_sums``; the specification is in ``csrc/stratum_sums.h``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend

if TYPE_CHECKING:
    from torch import Tensor


def is_supported(rows: Tensor, ids: Tensor, num_strata: int) -> str | None:
    """Return None if the C++ kernel takes these rows, else the reason why not."""
    if rows.device.type != "cpu":
        return f"the tensors are on {rows.device.type}, not cpu"
    if rows.dtype is not torch.float32 and rows.dtype is not torch.float64:
        return f"dtype {rows.dtype} is neither float32 nor float64"
    return None


def run(rows: Tensor, ids: Tensor, out: Tensor) -> None:
    """Write the sums into ``out``; arguments as of the reference."""
    torch.ops.pinet_cpp.stratum_sums.default(rows, ids.contiguous(), out)


BACKEND = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "stratum_sums"),
    is_supported=is_supported,
    impl=run,
)
