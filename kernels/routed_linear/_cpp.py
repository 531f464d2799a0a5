"""C++ backend of ``routed_linear``; specification: ``csrc/routed_linear.h``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def _refusal(rows: Tensor) -> str | None:
    if rows.device.type != "cpu":
        return f"the tensors are on {rows.device.type}, not cpu"
    if rows.dtype is not torch.float32 and rows.dtype is not torch.float64:
        return f"dtype {rows.dtype} is neither float32 nor float64"
    return None


def supports_forward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
) -> str | None:
    """Return None if the C++ kernel takes these tensors, else the reason why not."""
    return _refusal(rows)


def supports_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
) -> str | None:
    """Return None if the C++ kernel takes these tensors, else the reason why not."""
    return _refusal(rows)


def run_forward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
    out: Tensor,
    precision: str = "ieee",
) -> None:
    """Write ``out``; arguments as of the reference."""
    if order is None:
        torch.ops.pinet_cpp.routed_linear.default(rows, weight, bias, row_offsets, out)
        return
    sorted_out = torch.empty_like(out)
    sorted_rows = rows.index_select(0, order)
    torch.ops.pinet_cpp.routed_linear.default(sorted_rows, weight, bias, row_offsets, sorted_out)
    out.index_copy_(0, order, sorted_out)


def run_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
    grad_rows: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    precision: str = "ieee",
) -> None:
    """Write the gradients that are wanted; arguments as of the reference."""
    sorted_grad = grad if order is None else grad.index_select(0, order)
    if grad_rows is not None:
        assert weight is not None
        sorted_out = grad_rows if order is None else torch.empty_like(grad_rows)
        transposed = weight.transpose(1, 2)
        torch.ops.pinet_cpp.routed_linear.default(
            sorted_grad, transposed, None, row_offsets, sorted_out
        )
        if order is not None:
            grad_rows.index_copy_(0, order, sorted_out)
    if grad_weight is None and grad_bias is None:
        return
    sorted_rows = rows
    if order is not None and grad_weight is not None:
        sorted_rows = rows.index_select(0, order)
    # What a head's rows give its weight is what a stratum's rows give a shared one.
    torch.ops.pinet_cpp.stratified_linear_backward.default(
        grad, None, sorted_grad, sorted_rows, row_offsets, ids, None, grad_weight, grad_bias
    )


FORWARD = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "routed_linear"),
    is_supported=supports_forward,
    impl=run_forward,
)
BACKWARD = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "routed_linear"),
    is_supported=supports_backward,
    impl=run_backward,
)
