"""C++ backend of ``dropout_mask``; the specification is in ``csrc/dropout_mask.h``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend

if TYPE_CHECKING:
    from torch import Tensor


def is_supported(mask: Tensor) -> str | None:
    """Return None if the C++ kernel writes this mask, else the reason why not."""
    if mask.device.type != "cpu":
        return f"the mask is on {mask.device.type}, not cpu"
    if mask.dtype is not torch.float32 and mask.dtype is not torch.float64:
        return f"dtype {mask.dtype} is neither float32 nor float64"
    return None


def run(rate: float, seed: int, mask: Tensor) -> None:
    """Write the mask; arguments as of the reference."""
    torch.ops.pinet_cpp.dropout_mask.default(rate, seed, mask)


BACKEND = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "dropout_mask"),
    is_supported=is_supported,
    impl=run,
)
