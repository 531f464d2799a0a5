"""Every rule drives real steps: absent strata, lookups, state that follows taken steps."""

from __future__ import annotations

import copy

import pytest
import torch
from support.oracle import autograd_stratum_gradients
from torch import nn

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.aggregation.rules import EMA, SignAgreement, Warmup, names

IDS = torch.tensor([0, 1, 1, 2, 0, 1, 2])
ITEMS = torch.tensor([[1, 5], [2, 0], [2, 3], [8, 0], [0, 1], [3, 3], [7, 1]])


def tower() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 2)
    ).double()


def run(opt: GradientAggregator, model: nn.Module, ids: torch.Tensor = IDS) -> None:
    opt.zero_grad()
    with opt.stratify(ids, num_strata=4):
        losses = model(ITEMS).pow(2).sum((1, 2))
    opt.backward(losses)
    opt.step()


@pytest.mark.parametrize("rule", names())
def test_every_rule_trains_with_an_absent_stratum(rule: str) -> None:
    model = tower()
    before = copy.deepcopy(model.state_dict())
    opt = GradientAggregator(torch.optim.Adam(model.parameters(), lr=0.1), rule)
    for _ in range(3):
        run(opt, model)
    after = model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert torch.equal(after["0.weight"][0], before["0.weight"][0])  # padding stays untrained
    if opt.report.weights is not None:
        assert (opt.report.weights[..., 3] == 0).all()


def test_elementwise_rule_counts_only_strata_that_touched_an_item() -> None:
    model = nn.Embedding(9, 4).double()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=1.0), SignAgreement())

    def losses() -> torch.Tensor:
        return (model(ITEMS) + 3).pow(2).sum((1, 2))

    gradients = autograd_stratum_gradients(losses, IDS, [model.weight], 3)[0]
    with opt.stratify(IDS):
        values = losses()
    opt.backward(values)
    touched = torch.stack(
        [torch.isin(torch.arange(9), ITEMS[s == IDS].flatten()) for s in range(3)]
    )
    expected = SignAgreement().combine(gradients, touched)
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-10, atol=1e-12)
    assert opt.report.weights is None
    assert opt.report.gram is not None


def test_a_function_is_a_rule() -> None:
    model = tower()
    opt = GradientAggregator(
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda gram: torch.full((len(gram),), 1 / len(gram), dtype=gram.dtype),
    )
    run(opt, model)
    assert opt.report.weights is not None
    assert opt.report.weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_warmup_runs_plain_steps_first() -> None:
    model = tower()
    rule = Warmup("agreement", steps=2, before="joint")
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), rule)
    modes = []
    for _ in range(4):
        run(opt, model)
        modes.append(opt.report.mode)
    assert modes == ["reweighted", "reweighted", "one-pass", "one-pass"]


def test_rule_state_follows_taken_steps_and_is_saved() -> None:
    model = tower()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), EMA("mgda", beta=0.5))
    run(opt, model)
    taken = copy.deepcopy(opt.state_dict()["pinet_fast"]["rule"])
    with opt.stratify(IDS, num_strata=4):
        losses = model(ITEMS).pow(2).sum((1, 2))
    opt.backward(losses)
    opt.zero_grad()  # a loss scaler skipped the step
    kept = opt.state_dict()["pinet_fast"]["rule"]
    assert torch.equal(taken["average"].nan_to_num(), kept["average"].nan_to_num())
    twin_model = tower()
    twin_model.load_state_dict(model.state_dict())
    twin = GradientAggregator(
        torch.optim.SGD(twin_model.parameters(), lr=0.1), EMA("mgda", beta=0.5)
    )
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(opt, model)
    run(twin, twin_model)
    for mine, theirs in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rule", names())
def test_an_overflow_stays_visible_to_a_loss_scaler(rule: str) -> None:
    """A rule may drop the stratum that overflowed; its NaN must reach p.grad all the same."""
    model = nn.Linear(3, 2)
    x = torch.randn(7, 3)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = copy.deepcopy(model.state_dict())
    with opt.stratify(IDS):
        losses = model(x).pow(2).sum(1) * torch.where(IDS == 1, torch.inf, 1.0)
    opt.backward(scaler.scale(losses))
    scaler.step(opt)
    scaler.update()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert scaler.get_scale() < 8.0
