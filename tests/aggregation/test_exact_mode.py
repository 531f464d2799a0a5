"""Exact mode: S backwards on the joint graph, for losses that mix users."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.errors import ConfigError, StratumLeakError

IDS = torch.tensor([0, 1, 1, 2, 0, 1, 2])


class InBatch(nn.Module):
    """Two towers with in-batch negatives: every loss sees all users' items."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Linear(3, 4)
        self.items = nn.Embedding(9, 4, sparse=True)

    def forward(self, x: Tensor, items: Tensor) -> Tensor:
        logits = self.users(x) @ self.items(items).T
        return F.cross_entropy(logits, torch.arange(len(x)), reduction="none")


X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
ITEMS = torch.tensor([1, 5, 2, 2, 8, 0, 3])


def test_in_batch_negatives_are_exact() -> None:
    torch.manual_seed(0)
    model = InBatch().double()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement", mode="exact")
    expected = autograd_stratum_gradients(lambda: model(X, ITEMS), IDS, [*model.parameters()], 3)
    with opt.stratify(IDS):
        losses = model(X, ITEMS)
    opt.backward(losses)
    report = opt.report
    assert report.mode == "exact"
    assert report.leak == "unchecked"
    assert report.weights is not None
    assert report.gram is not None
    flat = torch.cat([g.flatten(1) for g in expected], dim=1)
    torch.testing.assert_close(report.gram, flat @ flat.T, rtol=1e-9, atol=1e-12)
    for i, p in enumerate(model.parameters()):
        mix = (report.weights[i][:, None] * expected[i].flatten(1)).sum(0).view_as(p)
        assert p.grad is not None
        torch.testing.assert_close(p.grad.to_dense(), mix, rtol=1e-9, atol=1e-12)


def test_the_same_model_in_one_pass_is_a_leak_that_names_exact_mode() -> None:
    model = InBatch().double()
    model.items = nn.Embedding(9, 4).double()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS):
        losses = model(X, ITEMS)
    with pytest.raises(StratumLeakError, match='mode="exact"'):
        opt.backward(losses)


def test_both_modes_agree_where_users_do_not_mix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    for net, mode in ((model, "one-pass"), (twin, "exact")):
        opt = GradientAggregator(torch.optim.SGD(net.parameters(), lr=0.1), "agreement", mode=mode)  # type: ignore[arg-type]
        for _ in range(3):
            opt.zero_grad()
            with opt.stratify(IDS):
                losses = net(X).pow(2).sum(1)
            opt.backward(losses)
            opt.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_from_before_are_kept() -> None:
    model = nn.Linear(3, 2).double()
    model.weight.grad = torch.ones_like(model.weight)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement", mode="exact")
    with opt.stratify(IDS):
        losses = model(X).pow(2).sum(1)
    opt.backward(losses)
    with_old = model.weight.grad.clone()
    model.weight.grad = None
    with opt.stratify(IDS):
        losses = model(X).pow(2).sum(1)
    opt.backward(losses)
    assert model.weight.grad is not None
    torch.testing.assert_close(with_old, model.weight.grad + 1)


def test_unknown_mode() -> None:
    with pytest.raises(ConfigError, match='"one-pass" or "exact"'):
        GradientAggregator(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1), mode="fast")  # type: ignore[arg-type]
