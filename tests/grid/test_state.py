"""Copies, checkpoints and restores of the wrapper: nothing is lost, the rule's state included."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from grid.contract import IDS, S, assert_same_tree, network, run_step
from pinet_fast import GradientAggregator
from pinet_fast.rules import EMA


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("rule", ["agreement", "ema"])
def test_copies_train_on_exactly(copier: str, rule: str) -> None:
    model = network()
    opt = GradientAggregator(sgd(model), EMA("mgda") if rule == "ema" else rule, num_strata=S)
    for _ in range(2):
        run_step(opt, model)
    twin, other = COPIERS[copier]((model, opt))
    for _ in range(2):
        run_step(opt, model)
    assert not torch.equal(twin[0].weight, model[0].weight)
    for _ in range(2):
        run_step(other, twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_dict_carries_the_rules_state_through_a_file() -> None:
    runs = []
    for interrupted in (False, True):
        model = network()
        opt = GradientAggregator(sgd(model), EMA("mgda", beta=0.9), num_strata=S)
        for i in range(5):
            ids = IDS.roll(i)  # other Grams, so that a lost average shows
            if interrupted and i == 3:
                file = io.BytesIO()
                torch.save({"opt": opt.state_dict(), "model": model.state_dict()}, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
                model = network(seed=9)
                model.load_state_dict(state["model"])
                opt = GradientAggregator(sgd(model), EMA("mgda", beta=0.9), num_strata=S)
                opt.load_state_dict(state["opt"])
            run_step(opt, model, ids)
        runs.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_zero_gradient_step_of_a_fresh_optimizer_makes_state_quietly() -> None:
    """What distributed checkpointing does before it loads: zero gradients, rate 0, one step."""
    model = network()
    opt = GradientAggregator(torch.optim.Adam(model.parameters()), "agreement", num_strata=S)
    before = copy.deepcopy(model.state_dict())
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step(closure=None)  # warnings are errors in this suite
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    opt.zero_grad(set_to_none=True)
    assert len(opt.state) == 4
    assert_same_tree(dict(model.state_dict()), dict(before))
    run_step(opt, model)
    assert opt.report.mode == "one-pass"


def test_distributed_checkpoint_saves_and_loads() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = network()
    opt = GradientAggregator(torch.optim.Adam(model.named_parameters()), "agreement", num_strata=S)
    run_step(opt, model)
    state = copy.deepcopy(get_optimizer_state_dict(model, opt))
    twin = copy.deepcopy(model)
    fresh = GradientAggregator(torch.optim.Adam(twin.named_parameters()), "agreement", num_strata=S)
    set_optimizer_state_dict(twin, fresh, state)
    run_step(opt, model)
    run_step(fresh, twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
