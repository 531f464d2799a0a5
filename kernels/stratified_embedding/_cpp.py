"""C++ backend of ``stratified_embedding``; the specification is in its header in ``csrc/``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend
from .reference import check_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def is_supported(like: Tensor) -> str | None:
    """Return None if the C++ kernel takes gradients like this one, else the reason why not."""
    if like.device.type != "cpu":
        return f"the tensors are on {like.device.type}, not cpu"
    if like.dtype is not torch.float32 and like.dtype is not torch.float64:
        return f"dtype {like.dtype} is neither float32 nor float64"
    return None


def run_reduce(
    ids: Sequence[Tensor],
    strata: Sequence[Tensor],
    grads: Sequence[Tensor],
    num_strata: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows [U], values [S, U, ...] and touched [S, U]; arguments as of the reference."""
    try:
        return torch.ops.pinet_cpp.stratified_embedding_reduce.default(  # type: ignore[no-any-return]
            ids, strata, grads, num_strata, num_rows
        )
    except RuntimeError:
        check_ranges(ids, strata, num_strata, num_rows)  # says which entry it was
        raise


def run_add(
    dense: Tensor, ids: Sequence[Tensor], strata: Sequence[Tensor], grads: Sequence[Tensor]
) -> None:
    """Add the sums to ``dense`` [S, V, ...]; arguments as of the reference."""
    try:
        torch.ops.pinet_cpp.stratified_embedding_add.default(dense, ids, strata, grads)
    except RuntimeError:
        check_ranges(ids, strata, dense.shape[0], dense.shape[1])
        raise


REDUCE = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "stratified_embedding_reduce"),
    is_supported=is_supported,
    impl=run_reduce,
)
ADD = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "stratified_embedding_add"),
    is_supported=is_supported,
    impl=run_add,
)
