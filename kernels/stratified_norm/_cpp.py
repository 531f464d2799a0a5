"""C++ backend of ``stratified_norm_backward``; specification: ``csrc/stratified_norm.h``."""

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
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    num_strata: int,
) -> str | None:
    """Return None if the C++ kernel takes these tensors, else the reason why not."""
    if rows.device.type != "cpu":
        return f"the tensors are on {rows.device.type}, not cpu"
    if rows.dtype is not torch.float32 and rows.dtype is not torch.float64:
        return f"dtype {rows.dtype} is neither float32 nor float64"
    for name, other in (("grad", grad), ("mean", mean), ("rstd", rstd), ("weight", weight)):
        if other is not None and other.dtype is not rows.dtype:
            return f"{name} is {other.dtype}, rows is {rows.dtype}"
    return None


def run(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    grad_rows: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    row_offsets: Sequence[int] | None = None,
) -> None:
    """Write the gradients that are wanted; arguments as of the reference."""
    strata = next((x.shape[0] for x in (grad_weight, grad_bias) if x is not None), None)
    if strata is None:  # nothing by stratum: all rows are of one
        strata, ids = 1, torch.zeros_like(ids)
    torch.ops.pinet_cpp.stratified_norm_backward.default(
        grad,
        rows,
        mean.contiguous(),
        rstd.contiguous(),
        None if weight is None else weight.contiguous(),
        ids.contiguous(),
        strata,
        grad_rows,
        grad_weight,
        grad_bias,
    )


BACKEND = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "stratified_norm_backward"),
    is_supported=is_supported,
    impl=run,
)
