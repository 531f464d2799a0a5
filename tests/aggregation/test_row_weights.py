"""Row weights that a model computes, and constant rules of users: the gradient of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pinet_fast import rules
from pinet_fast.aggregation import GradientAggregator

D = 4
IDS = torch.tensor([0, 0, 1, 1, 1, 2])
NUM_STRATA = 3
LANES = pytest.mark.parametrize("lane", ["0", "1"])


class Gated(nn.Module):
    """Losses, and weights of rows by a gate that is trained too."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.gate = nn.Linear(D, 1), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and weights, [B] each."""
        return self.score(x).squeeze(1).square(), self.gate(x).sigmoid().squeeze(1)


def gradients_of(model: Gated, x: Tensor, factors: Tensor) -> list[Tensor]:
    """Return the gradients of the weighted means; the sum of the weights has a gradient too."""
    losses, weights = model(x)
    means = [
        (losses * weights)[s == IDS].sum() / weights[s == IDS].sum() for s in range(NUM_STRATA)
    ]
    return list(torch.autograd.grad(torch.stack(means), list(model.parameters()), factors))


@LANES
@pytest.mark.parametrize("mode", ["one-pass", "exact"])
@pytest.mark.parametrize("rule", ["joint", "agreement"])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_weights_with_a_graph_get_their_gradient(
    monkeypatch: pytest.MonkeyPatch, lane: str, mode: str, rule: str, order: str
) -> None:
    monkeypatch.setenv("PINET_FAST_LANE", lane)
    torch.manual_seed(0)
    model = Gated().double()
    opt = GradientAggregator(
        torch.optim.SGD(model.parameters(), lr=0.1), rule, num_strata=NUM_STRATA, mode=mode
    )
    place = torch.arange(6) if order == "sorted" else torch.tensor([3, 0, 5, 1, 4, 2])
    for _ in range(4):
        x = torch.randn(6, D, dtype=torch.float64)
        opt.zero_grad()
        with opt.stratify(IDS[place]):
            losses, weights = model(x[place])
        opt.backward(losses, weights)
        found = opt.report.weights
        assert found is not None
        per_parameter = found if found.dim() == 2 else found.expand(4, NUM_STRATA)
        for i, p in enumerate(model.parameters()):
            assert p.grad is not None
            wanted = gradients_of(model, x, per_parameter[i])[i]
            torch.testing.assert_close(p.grad, wanted)
        means = opt.report.losses
        assert means is not None
        assert not means.requires_grad


class Listed(rules.ConstantRule):
    """Says its weights as a list, or as a tensor."""

    def __init__(self, as_tensor: bool) -> None:
        self.as_tensor = as_tensor

    def weights(self, batch: rules.BatchStrata) -> tuple[float, ...]:
        """Return 1/2, 1/4, 1/4."""
        found = [0.5, 0.25, 0.25]
        return torch.tensor(found) if self.as_tensor else found  # type: ignore[return-value]


@LANES
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("report_every", [None, 1])
def test_a_rule_of_users_may_give_a_list(
    monkeypatch: pytest.MonkeyPatch, lane: str, as_tensor: bool, report_every: int | None
) -> None:
    monkeypatch.setenv("PINET_FAST_LANE", lane)
    model = Gated().double()
    opt = GradientAggregator(
        torch.optim.SGD(model.parameters(), lr=0.1), Listed(as_tensor), num_strata=NUM_STRATA,
        report_every=report_every,
    )  # fmt: skip
    x = torch.randn(6, D, dtype=torch.float64)
    with opt.stratify(IDS):
        losses, _ = model(x)
    opt.backward(losses)
    losses, _ = model(x)
    means = torch.stack([losses[s == IDS].mean() for s in range(NUM_STRATA)])
    factors = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    wanted = torch.autograd.grad(means, list(model.score.parameters()), factors)
    for p, grad in zip(model.score.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad)
