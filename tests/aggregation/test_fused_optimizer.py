"""Fused optimizers behind the wrapper, as the recipe uses them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator

IDS = torch.tensor([0, 1, 1, 2, 0, 1, 1])
X = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))
FUSED = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.unused, self.last = nn.Linear(3, 4), nn.Linear(2, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x))).squeeze(1)
        return out


def steps(model: Net, opt: GradientAggregator, count: int) -> None:
    for _ in range(count):
        opt.zero_grad()
        with opt.stratify(IDS, num_strata=3):
            losses = model(X).square()
        opt.backward(losses)
        opt.step()


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("rule", ["backdoor", "agreement", "joint"])
def test_steps_are_those_of_the_plain_kind(kind: str, rule: str) -> None:
    found = []
    for fused in (False, True):
        model = Net()
        inner = FUSED[kind](model.parameters(), lr=0.01, fused=fused)  # type: ignore[call-arg]
        steps(model, GradientAggregator(inner, rule), 5)
        found.append([p.detach().clone() for p in model.parameters()])
    for plain, fused_one in zip(*found, strict=True):
        torch.testing.assert_close(fused_one, plain, rtol=1e-6, atol=1e-7)


def test_resuming_changes_no_bit() -> None:
    def made() -> tuple[Net, GradientAggregator]:
        model = Net()
        return model, GradientAggregator(
            torch.optim.Adam(model.parameters(), lr=0.01, fused=True), "agreement"
        )

    whole, opt = made()
    steps(whole, opt, 3)
    kept = copy.deepcopy((whole.state_dict(), opt.state_dict()))
    steps(whole, opt, 3)
    resumed, again = made()
    resumed.load_state_dict(kept[0])
    again.load_state_dict(kept[1])
    steps(resumed, again, 3)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
