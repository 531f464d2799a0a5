"""C++ backend of ``ragged_attention``; specification: ``csrc/ragged_attention.h``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend

if TYPE_CHECKING:
    from torch import Tensor


def is_supported(qkv: Tensor) -> str | None:
    """Return None if the C++ kernel takes this tensor, else the reason why not."""
    if qkv.device.type != "cpu":
        return f"the tensors are on {qkv.device.type}, not cpu"
    if qkv.dtype is not torch.float32 and qkv.dtype is not torch.float64:
        return f"dtype {qkv.dtype} is neither float32 nor float64"
    return None


def run_forward(
    qkv: Tensor,
    offsets: Tensor,
    max_len: int,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write ``out`` and ``lse``; arguments as of the reference."""
    torch.ops.pinet_cpp.ragged_attention.default(
        _with_unit_columns(qkv), offsets.contiguous(), dropout, _number(seed), out, lse
    )


def run_backward(
    grad: Tensor,
    qkv: Tensor,
    offsets: Tensor,
    max_len: int,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_qkv: Tensor,
) -> None:
    """Write ``grad_qkv``; arguments as of the reference."""
    torch.ops.pinet_cpp.ragged_attention_backward.default(
        _with_unit_columns(grad), _with_unit_columns(qkv), offsets.contiguous(), dropout,
        _number(seed), out, lse, grad_qkv,
    )  # fmt: skip


def _with_unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


FORWARD = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "ragged_attention"),
    is_supported=is_supported,
    impl=run_forward,
)
BACKWARD = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "ragged_attention_backward"),
    is_supported=is_supported,
    impl=run_backward,
)
