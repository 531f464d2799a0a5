"""The compiled lane over the life of a model: conversions, freezing, copies, many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.lanes import WARM_UP, Batch, batches, compare, per_row
from torch import Tensor, nn

from pinet_fast.aggregation.lane import refusal

if TYPE_CHECKING:
    from pinet_fast.aggregation import GradientAggregator

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")

V, D = 20, 6


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(V, D)
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, D)

    def forward(self, batch: Batch) -> Tensor:
        x = self.items(batch.ids(V, batch.num_rows))
        return x + F.gelu(self.up(self.norm(x)))


def small(model: Small, batch: Batch) -> Tensor:
    return per_row(model(batch)).double()


def sgd(named: Any) -> torch.optim.SGD:
    return torch.optim.SGD(named, lr=0.1)


def test_parameters_swapped_for_others() -> None:
    """Also nothing but the optimizer holds their tensors between steps, or torch refuses."""

    def swap(step: int, model: Small, opt: GradientAggregator) -> None:
        if step == WARM_UP + 1:
            opt.zero_grad()
            for p in list(model.parameters()):
                generator = torch.Generator().manual_seed(step)
                other = nn.Parameter(torch.randn(p.shape, generator=generator))
                torch.utils.swap_tensors(p, other)

    ours, _ = compare(Small, batches(7), forward=small, before=swap, optimizer=sgd)
    assert ours.num_in_python[WARM_UP:] == [0] * 4
