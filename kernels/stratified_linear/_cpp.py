"""C++ backend of ``stratified_linear_backward``; specification: ``csrc/stratified_linear.h``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def is_supported(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_offsets: Sequence[int],
    order: Tensor | None,
) -> str | None:
    """Return None if the C++ kernel takes these tensors, else the reason why not."""
    if rows.device.type != "cpu":
        return f"the tensors are on {rows.device.type}, not cpu"
    if rows.dtype is not torch.float32 and rows.dtype is not torch.float64:
        return f"dtype {rows.dtype} is neither float32 nor float64"
    return None


def run(
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
    by_stratum = (grad, rows)
    if order is not None and grad_weight is not None:
        by_stratum = (grad.index_select(0, order), rows.index_select(0, order))
    torch.ops.pinet_cpp.stratified_linear_backward(
        grad,
        weight,
        *by_stratum,
        row_offsets,
        ids,
        grad_rows,
        grad_weight,
        grad_bias,
    )


BACKEND = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "stratified_linear_backward"),
    is_supported=is_supported,
    impl=run,
)
