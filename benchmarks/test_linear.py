"""Backward of a linear layer by stratum, relative to torch's own of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pinet_fast.kernels import stratified_linear_backward
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.stratified_linear import _cpp

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, WIDTH = 6400, 64


def inputs(num_strata: int) -> tuple[torch.Tensor, ...]:
    """Return grad, rows, weight and sorted ids of unequal strata."""
    torch.manual_seed(0)
    ids = (torch.rand(ROWS).square() * num_strata).long().sort().values
    return torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH), ids


@pytest.mark.parametrize("num_strata", [4, 8])
def test_linear_over_one_backward(
    num_strata: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "linear"
    grad, rows, weight, ids = inputs(num_strata)
    offsets = (0, *torch.bincount(ids, minlength=num_strata).cumsum(0).tolist())

    def ours() -> Any:
        return stratified_linear_backward(grad, rows, weight, ids, offsets)

    def theirs() -> Any:
        return grad.mm(weight), grad.t().mm(rows), grad.sum(0)

    mine, other = ours(), theirs()
    torch.testing.assert_close(mine[0], other[0])
    torch.testing.assert_close(mine[1].sum(0), other[1], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(mine[2].sum(0), other[2], rtol=1e-4, atol=1e-2)
    paired(ours, theirs, rounds=200)


@pytest.mark.parametrize("num_strata", [4, 8])
def test_linear_over_calls_of_torch(
    num_strata: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    """Against the same products called from Python, a matrix and a sum a stratum."""
    benchmark.group = "linear"
    grad, rows, weight, ids = inputs(num_strata)
    sizes = torch.bincount(ids, minlength=num_strata)
    offsets, split = (0, *sizes.cumsum(0).tolist()), sizes.tolist()

    def ours() -> Any:
        return stratified_linear_backward(grad, rows, weight, ids, offsets)

    def theirs() -> Any:
        by_stratum = list(zip(grad.split(split), rows.split(split), strict=True))
        return (
            grad.mm(weight),
            torch.stack([g.t().mm(x) for g, x in by_stratum]),
            torch.stack([g.sum(0) for g, _ in by_stratum]),
        )

    for mine, other in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
    paired(ours, theirs, rounds=200)


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize(("wide", "deep"), [(64, 64), (192, 64), (50, 33)])
@pytest.mark.parametrize("kernel", ["fused", "vendor"])
def test_cpp_kernel_over_one_backward(
    kernel: str, wide: int, deep: int, is_sorted: bool,
    paired: Callable[..., Any], benchmark: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both C++ kernels on this processor, whichever of them it would choose; S = 4."""
    if reason := library_refusal():
        pytest.skip(reason)
    benchmark.group = "linear"
    monkeypatch.setattr(_cpp, "has_tuned_blas", lambda: kernel == "vendor")
    *_, ids = inputs(4)
    ids = ids if is_sorted else ids[torch.randperm(ROWS)]
    order = None if is_sorted else ids.argsort(stable=True)
    offsets = (0, *torch.bincount(ids, minlength=4).cumsum(0).tolist())
    grad, rows, weight = (torch.randn(*s) for s in ((ROWS, wide), (ROWS, deep), (wide, deep)))

    def ours() -> Any:
        return stratified_linear_backward(grad, rows, weight, ids, offsets, order, backend="cpp")

    def theirs() -> Any:
        return grad.mm(weight), grad.t().mm(rows), grad.sum(0)

    mine, other = ours(), theirs()
    torch.testing.assert_close(mine[0], other[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mine[1].sum(0), other[1], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(mine[2].sum(0), other[2], rtol=1e-4, atol=1e-2)
    paired(ours, theirs, rounds=100)
