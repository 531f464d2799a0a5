"""Norm backward and sums by stratum, relative to the calls of torch that know no strata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pinet_fast.kernels import stratified_norm_backward, stratum_sums

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, WIDTH, STRATA = 6400, 64, 4
layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def ids(order: str) -> torch.Tensor:
    """Return strata of unequal sizes, sorted or not."""
    found = (torch.rand(ROWS).square() * STRATA).long()
    return found.sort().values if order == "sorted" else found


@pytest.fixture(params=[1, 2])
def threads(request: Any) -> Any:
    """Run with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def norm_inputs() -> tuple[torch.Tensor, ...]:
    """Return grad, rows, weight, mean and rstd, the last two as torch gives them, [N, 1]."""
    grad, rows, weight = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH), torch.rand(WIDTH)
    _, mean, rstd = torch.native_layer_norm(rows, [WIDTH], weight, weight, 1e-5)
    return grad, rows, weight, mean, rstd


@pytest.mark.parametrize("order", ["sorted", "any"])
def test_norm_over_one_backward_of_torch(
    order: str, threads: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    """S = 4 against the gradients of the whole batch."""
    benchmark.group = "norm"
    torch.manual_seed(0)
    grad, rows, weight, mean, rstd = norm_inputs()
    strata = ids(order)
    flat_mean, flat_rstd = mean.flatten(), rstd.flatten()

    def ours() -> Any:
        return stratified_norm_backward(grad, rows, flat_mean, flat_rstd, weight, strata, STRATA)

    def theirs() -> Any:
        return layer_norm_backward(
            grad, rows, [WIDTH], mean, rstd, weight, weight, [True, True, True]
        )

    torch.testing.assert_close(ours()[1].sum(0), theirs()[1], rtol=1e-4, atol=1e-2)
    paired(ours, theirs, rounds=400)


def test_norm_over_a_backward_a_stratum(
    threads: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    """S = 4, sorted, against one call for the rows and one a stratum for the parameters."""
    benchmark.group = "norm"
    torch.manual_seed(0)
    grad, rows, weight, mean, rstd = norm_inputs()
    strata = ids("sorted")
    sizes = torch.bincount(strata, minlength=STRATA).tolist()
    flat_mean, flat_rstd = mean.flatten(), rstd.flatten()

    def ours() -> Any:
        return stratified_norm_backward(grad, rows, flat_mean, flat_rstd, weight, strata, STRATA)

    def theirs() -> Any:
        whole = layer_norm_backward(
            grad, rows, [WIDTH], mean, rstd, weight, weight, [True, False, False]
        )
        parts = [
            layer_norm_backward(g, x, [WIDTH], m, r, weight, weight, [False, True, True])
            for g, x, m, r in zip(*(t.split(sizes) for t in (grad, rows, mean, rstd)), strict=True)
        ]
        return whole[0], torch.stack([p[1] for p in parts]), torch.stack([p[2] for p in parts])

    for mine, other in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
    paired(ours, theirs, rounds=200)


@pytest.mark.parametrize("order", ["sorted", "any"])
def test_sums_over_one_sum_of_torch(
    order: str, threads: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    """S = 4 against the sum of the whole batch."""
    benchmark.group = "norm"
    torch.manual_seed(0)
    rows, strata = torch.randn(ROWS, WIDTH), ids(order)
    expected = rows.double().sum(0).float()
    torch.testing.assert_close(
        stratum_sums(rows, strata, STRATA).sum(0), expected, rtol=1e-4, atol=1e-3
    )
    paired(lambda: stratum_sums(rows, strata, STRATA), lambda: rows.sum(0), rounds=400)


def test_sums_over_a_sum_a_stratum(
    threads: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    """S = 4, sorted, against a sum a stratum."""
    benchmark.group = "norm"
    torch.manual_seed(0)
    rows, strata = torch.randn(ROWS, WIDTH), ids("sorted")
    sizes = torch.bincount(strata, minlength=STRATA).tolist()

    def theirs() -> Any:
        return torch.stack([part.sum(0) for part in rows.split(sizes)])

    torch.testing.assert_close(stratum_sums(rows, strata, STRATA), theirs(), rtol=1e-4, atol=1e-3)
    paired(lambda: stratum_sums(rows, strata, STRATA), theirs, rounds=400)
