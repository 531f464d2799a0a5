"""Plugin heads as one routed layer, relative to a loop over heads and to one dense layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from pinet_fast.kernels import routed_linear

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, WIDTH = 6400, 64


def inputs(num_heads: int, is_sorted: bool) -> tuple[Any, ...]:
    """Return rows, weight, bias, ids, offsets and order of heads of unequal size."""
    torch.manual_seed(0)
    ids = (torch.rand(ROWS).square() * num_heads).long()
    ids = ids.sort().values if is_sorted else ids
    offsets = (0, *torch.bincount(ids, minlength=num_heads).cumsum(0).tolist())
    order = None if is_sorted else torch.argsort(ids, stable=True)
    tensors = [
        torch.randn(shape, requires_grad=True)
        for shape in ((ROWS, WIDTH), (num_heads, WIDTH, WIDTH), (num_heads, WIDTH))
    ]
    return (*tensors, ids, offsets, order)


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("num_heads", [2, 8])
def test_routed_over_a_loop_of_linear(
    num_heads: int, is_sorted: bool, paired: Callable[..., Any], benchmark: Any
) -> None:
    """Forward and backward against ``F.linear`` a head."""
    benchmark.group = "routed"
    rows, weight, bias, ids, offsets, order = inputs(num_heads, is_sorted)
    grad = torch.randn(ROWS, WIDTH)

    def ours() -> Any:
        out = routed_linear(rows, weight, bias, ids, offsets, order)
        return out, *torch.autograd.grad(out, (rows, weight, bias), grad)

    def theirs() -> Any:
        routed = rows if order is None else rows.index_select(0, order)
        parts = [
            F.linear(routed[a:b], w, c)
            for a, b, w, c in zip(offsets, offsets[1:], weight, bias, strict=False)
        ]
        out = torch.cat(parts)
        if order is not None:
            out = torch.empty_like(out).index_copy(0, order, out)
        return out, *torch.autograd.grad(out, (rows, weight, bias), grad)

    for mine, other in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
    paired(ours, theirs, rounds=100)


@pytest.mark.parametrize("num_heads", [2, 8])
def test_routed_over_one_dense_layer(
    num_heads: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    """Forward and backward against one layer for all rows: the same operations."""
    benchmark.group = "routed"
    rows, weight, bias, ids, offsets, _ = inputs(num_heads, is_sorted=True)
    grad = torch.randn(ROWS, WIDTH)
    one, c = (t[0].detach().clone().requires_grad_() for t in (weight, bias))

    def ours() -> Any:
        out = routed_linear(rows, weight, bias, ids, offsets)
        return torch.autograd.grad(out, (rows, weight, bias), grad)

    def theirs() -> Any:
        return torch.autograd.grad(F.linear(rows, one, c), (rows, one, c), grad)

    assert all(torch.isfinite(g).all() for g in ours())
    paired(ours, theirs, rounds=100)
