"""The compiled lane: what it takes part in, and that it changes no bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from support.lanes import WARM_UP, Batch, batches, compare, per_row
from torch import Tensor, nn

from pinet_fast.aggregation.lane import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")

V, D = 20, 6


class Small(nn.Module):
    """One of each kind of boundary that the lane serves."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(V, D, padding_idx=0)
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, D)
        self.down = nn.Linear(D, D, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        x = self.items(batch.ids(V, batch.num_rows))
        return self.down(x + F.gelu(self.up(self.norm(x))))


def small(model: Small, batch: Batch) -> Tensor:
    return per_row(model(batch))


def test_it_takes_all_settled_boundaries_of_a_usual_model() -> None:
    ours, theirs = compare(Small, batches(6), forward=small)
    assert ours.num_in_python == [4, 0, 0, 0, 0, 0]
    assert theirs.num_in_python == [4] * 6


def without_up_where_even(model: Small, batch: Batch) -> Tensor:
    x = model.items(batch.ids(V, batch.num_rows))
    h = model.norm(x)
    return per_row(model.down(x + (F.gelu(model.up(h)) if batch.seed % 2 else h)))


def without_items_where_even(model: Small, batch: Batch) -> Tensor:
    x = model.items(batch.ids(V, batch.num_rows)) if batch.seed % 2 else torch.ones(D)
    rows = batch.numbers(batch.num_rows, D) + x
    return per_row(model.down(model.norm(rows)))


@pytest.mark.parametrize("forward", [without_up_where_even, without_items_where_even])
def test_a_parameter_that_some_batches_do_not_use(
    forward: Callable[[Small, Batch], Tensor],
) -> None:
    ours, _ = compare(Small, batches(9), forward=forward)
    # What the last forward did not use has no leaf yet: Python makes it.
    assert max(ours.num_in_python[WARM_UP:]) <= 1
