"""Backwards through the compiled lane: right ones, and those that must be refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.lanes import Batch, batches, compare, per_row
from torch import Tensor, nn

from pinet_fast.aggregation.lane import refusal

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")

V, D = 20, 6


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(V, D)
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, D)
        self.down = nn.Linear(D, D)


class Nothing(torch.autograd.Function):
    """Lets no gradient through, not even zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("which", ["items", "norm", "up"])
def test_no_gradient_at_all(which: str) -> None:
    """Weight decay moves a parameter whose gradient is zero, and not one that has none."""

    def forward(model: Small, batch: Batch) -> Tensor:
        def stop(x: Tensor, layer: str) -> Tensor:
            is_last = layer == which and batch.seed >= 4
            return Nothing.apply(x) if is_last else x  # type: ignore[no-any-return, no-untyped-call]

        x = stop(model.items(batch.ids(V, batch.num_rows)), "items")
        h = stop(model.norm(x), "norm")
        return per_row(model.down(x + stop(F.gelu(model.up(h)), "up")))

    def decaying(named: Any) -> torch.optim.SGD:
        return torch.optim.SGD(named, lr=0.1, weight_decay=0.1)

    ours, _ = compare(Small, batches(6), forward=forward, optimizer=decaying)
    assert ours.num_in_python[-2:] == [0, 0]
