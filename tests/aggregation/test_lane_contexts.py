"""The compiled lane beside other machinery of torch: it takes part, or leaves the call to Python."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.lanes import WARM_UP, Batch, batches, compare, per_row, train
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pinet_fast.aggregation.lane import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    return per_row(model(batch))


class Tagged(Tensor):
    """A subclass; its functions are those of tensors, and return it again."""


def test_a_subclass_of_tensor_stays_one() -> None:
    kinds = []

    def forward(model: Small, batch: Batch) -> Tensor:
        ids = batch.ids(V, batch.num_rows).as_subclass(Tagged)
        x = model.items(ids)
        h = model.up(model.norm(x))
        kinds.append((type(x), type(h)))
        return per_row(h.as_subclass(Tensor))

    ours, _ = compare(Small, batches(5), forward=forward)
    assert set(kinds) == {(Tagged, Tagged)}
    assert ours.num_in_python == [3] * 5
