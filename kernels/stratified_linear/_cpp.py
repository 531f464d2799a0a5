"""C++ backend of ``stratified_linear_backward``: by the vendor's BLAS, or fused.

Specifications: ``csrc/stratified_linear.h`` and ``csrc/fused_linear.h``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_FUSED_WEIGHT = 2**16  # numbers of a weight that stay in a cache beside the rows


@functools.cache
def has_tuned_blas() -> bool:
    """Return whether the vendor's BLAS has kernels made for this processor."""
    return bool(torch.ops.pinet_cpp.cpu_has_tuned_blas.default())


def is_fused(dtype: torch.dtype, num_strata: int, size: int) -> bool:
    """Return whether the fused kernel serves.

    Where it does is decided by the processor, the shapes and the dtype alone, and not for one
    stratum, whose bits are to be those of torch's own backward.
    """
    return (
        dtype is torch.float32 and num_strata > 1 and size <= _FUSED_WEIGHT and not has_tuned_blas()
    )


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
    if is_fused(rows.dtype, len(row_offsets) - 1, grad.shape[1] * rows.shape[1]):
        torch.ops.pinet_cpp.stratified_linear_fused.default(
            grad, weight, rows, row_offsets, order, grad_rows, grad_weight, grad_bias
        )
        return
    by_stratum = (grad, rows)
    if order is not None and grad_weight is not None:
        by_stratum = (grad.index_select(0, order), rows.index_select(0, order))
    torch.ops.pinet_cpp.stratified_linear_backward.default(
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
