"""What every Triton backend needs to know without importing Triton."""

from __future__ import annotations

import functools
import importlib.util

import torch

from pinet_fast import _env
from pinet_fast.errors import InputError

PRECISIONS = ("ieee", "tf32", "tf32x3")  # of float32 products


def is_interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on tensors of the CPU."""
    return _env.triton_interpreted()


@functools.cache
def triton_probe() -> str | None:
    """Return None if Triton kernels can run in this process, else the reason why not."""
    if is_interpreted():
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA device is older than sm_80"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def device_refusal(device: torch.device) -> str | None:
    """Return None if Triton kernels can read tensors of this device, else the reason why not."""
    expected = "cpu" if is_interpreted() else "cuda"
    if device.type != expected:
        return f"the tensors are on {device.type}, not {expected}"
    if expected == "cuda" and device.index != torch.cuda.current_device():
        return f"the tensors are on {device}, which is not the current device"
    return None


def precision_error(op: str, precision: object) -> InputError:
    """Return the error for a precision that is none of ``PRECISIONS``."""
    return InputError(
        f"{op}: precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}; leave it "
        "out for ieee"
    )


def padded(size: int) -> int:
    """Return the smallest power of two that is at least ``size``, as Triton shapes must be."""
    return 1 << max(size - 1, 0).bit_length()
