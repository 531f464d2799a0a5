"""Corners of the compiled lane: where it must leave the decision to Python, and its own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator, StrataIndex, lane

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    lane.refusal() is not None, reason=f"no compiled lane: {lane.refusal()}"
)

B, L, D = 6, 5, 4
STRATA = StrataIndex(torch.tensor([0, 0, 1, 1, 0, 1]), 2)
Losses = "Callable[[Any, int], Tensor]"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(10, D)
        self.first = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.last = nn.Linear(D, 1)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.norm(self.first(rows)).relu()).squeeze(1).pow(2)


def aggregator(model: nn.Module) -> GradientAggregator:
    return GradientAggregator(torch.optim.SGD(model.named_parameters(), lr=0.1), "agreement")


def train(losses: Losses, steps: int = 5, make: type[nn.Module] = Layers) -> list[list[Any]]:
    """Return the gradients of every step; losses are given the model and the step."""
    torch.manual_seed(0)
    model = make()
    optimizer = aggregator(model)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        with optimizer.stratify(STRATA):
            values = losses(model, step)
        optimizer.backward(values)
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
    assert (optimizer._lanes._lane is not None) == lane._env.lane_enabled()
    return found


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that calls another without the lane."""

    def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("PINET_FAST_LANE", "0")
            return call(*args, **kwargs)

    return run


def assert_same(got: list[list[Any]], expected: list[list[Any]]) -> None:
    for step, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert (a is None) == (b is None), (step, i)
            assert a is None or torch.equal(a, b), (step, i)


def test_a_layer_that_the_last_forward_left_out_is_used_again(in_python):
    rows = torch.randn(B, D)

    def losses(model: Layers, step: int) -> Tensor:
        hidden = rows if step == 3 else model.first(rows)
        return model.last(model.norm(hidden)).squeeze(1).pow(2)

    assert_same(train(losses, 6), in_python(train, losses, 6))


def test_a_table_that_is_dense_in_some_forwards_only(in_python):
    ids = torch.arange(B)

    def losses(model: Layers, step: int) -> Tensor:
        hidden = model.items(ids)
        if step % 3 == 2:
            return model.last(hidden).squeeze(1).pow(2)
        return torch.nn.functional.linear(hidden, model.items.weight, None).pow(2).mean(1)

    assert_same(train(losses, 8), in_python(train, losses, 8))
