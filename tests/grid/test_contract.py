"""The wrapper's contract: everything around the backward is as with the bare optimizer.

``tests/aggregation/test_optimizer.py`` has the first half; here is what it leaves out.
"""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from grid.contract import (
    IDS,
    S,
    X,
    assert_same_tree,
    losses_of,
    network,
    one_hot,
    run_step,
    stratum_gradients,
)
from pinet_fast import GradientAggregator, rules
from pinet_fast.rules import EMA, Backdoor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lrs.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, total_iters=2), lrs.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, total_iters=2), lrs.ExponentialLR(o, 0.5)], o
    ),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=9),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_no_scheduler_is_left_out() -> None:
    public = {
        name
        for name, value in vars(lrs).items()
        if isinstance(value, type) and issubclass(value, lrs.LRScheduler)
    }
    assert public - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_do_what_they_do_to_the_bare_optimizer(name: str) -> None:
    """Same rates (and momenta) as bare, and, with one stratum, the same weights bit for bit."""
    runs = []
    for wrapped in (False, True):
        model = nn.Linear(3, 2, bias=False)
        nn.init.constant_(model.weight, 0.3)
        opt = sgd(model)
        outer = GradientAggregator(opt, "agreement", num_strata=1) if wrapped else opt
        scheduler, x, seen = SCHEDULERS[name](outer), X.float(), []
        for i in range(6):
            if i == 3:  # a checkpoint in between, as at the end of an epoch
                state = copy.deepcopy(scheduler.state_dict())
                scheduler.load_state_dict(state)
            outer.zero_grad()
            if isinstance(outer, GradientAggregator):
                with outer.stratify(torch.zeros_like(IDS)):
                    losses = losses_of(model, x)
                outer.backward(losses)
            else:
                losses_of(model, x).mean().backward()
            outer.step()
            scheduler.step(*((1.0,) if name == "ReduceLROnPlateau" else ()))
            seen.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
        runs.append((seen, model.weight.detach().clone()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("rule", rules.names())
@pytest.mark.parametrize("every", [None, 1])
def test_one_stratum_is_the_bare_optimizer_bit_for_bit(rule: str, every: int | None) -> None:
    wrapped = nn.Linear(3, 2, bias=False)
    bare = copy.deepcopy(wrapped)
    x = X.float()
    opt = GradientAggregator(
        torch.optim.Adam(wrapped.parameters()), rule, num_strata=1, report_every=every
    )
    plain = torch.optim.Adam(bare.parameters())
    for _ in range(3):
        opt.zero_grad()
        with opt.stratify(torch.zeros_like(IDS)):
            losses = losses_of(wrapped, x)
        opt.backward(losses)
        opt.step()
        plain.zero_grad()
        losses_of(bare, x).mean().backward()
        plain.step()
    assert torch.equal(wrapped.weight, bare.weight)


def test_grad_scaler_with_an_inf_step_leaves_no_trace() -> None:
    """A skipped step changes neither weights nor optimizer nor the rule's average."""
    runs = []
    for overflow in (False, True):
        model = network().float()
        opt = GradientAggregator(sgd(model), EMA("mgda", beta=0.5), num_strata=S)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6)
        for i in range(4):
            poisons = [torch.inf, 1.0] if overflow and i == 2 else [1.0]
            for poison in poisons:
                before = copy.deepcopy((opt.state_dict(), model.state_dict()))
                opt.zero_grad()
                with opt.stratify(IDS):
                    losses = losses_of(model, X.float()) * poison
                opt.backward(scaler.scale(losses))
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
                scaler.step(opt)
                scaler.update()
                if poison != 1.0:
                    assert_same_tree((opt.state_dict(), model.state_dict()), before)
        runs.append([p.detach().clone() for p in model.parameters()])
    for mine, calm in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(mine, calm, rtol=1e-5, atol=1e-6)


def test_clip_grad_norm_clips_the_combined_gradient() -> None:
    model = network()
    opt = GradientAggregator(sgd(model), "mgda", num_strata=S)
    with opt.stratify(IDS):
        losses = losses_of(model)
    opt.backward(losses)
    weights, gram = opt.report.weights, opt.report.gram
    assert weights is not None
    assert gram is not None
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert float(norm) == pytest.approx(float(weights @ gram @ weights) ** 0.5, rel=1e-10)
    total = sum(float(p.grad.pow(2).sum()) for p in model.parameters() if p.grad is not None)
    assert total**0.5 == pytest.approx(1e-3, rel=1e-3)


def test_groups_added_later_train_exactly_with_their_own_rate() -> None:
    model = network()
    first, last = model[0], model[2]
    opt = GradientAggregator(
        torch.optim.SGD([{"params": first.parameters(), "lr": 0.1}], lr=9.0),
        Backdoor(one_hot(1)),
        num_strata=S,
        report_every=1,
    )
    assert isinstance(last, nn.Linear)
    last.requires_grad_(False)
    run_step(opt, model)
    last.requires_grad_(True)
    opt.add_param_group({"params": list(last.parameters()), "lr": 0.01})
    expected = stratum_gradients(model)
    before = [p.detach().clone() for p in model.parameters()]
    run_step(opt, model)
    assert len(opt.param_groups) == 2
    for i, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        rate = 0.1 if i < 2 else 0.01
        torch.testing.assert_close(p.detach(), old - rate * expected[i][1], rtol=1e-9, atol=1e-13)


def test_several_optimizers_are_one() -> None:
    """Groups, state, hooks, schedulers and state_dict span the list; each steps on its own."""
    model = network()
    parts = [
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        torch.optim.Adam(model[2].parameters(), lr=0.01),
    ]
    opt = GradientAggregator(parts, "agreement", num_strata=S)  # type: ignore[arg-type]
    fired: list[str] = []
    opt.register_step_post_hook(lambda *args: fired.append("outer"))
    for i, part in enumerate(parts):
        part.register_step_post_hook(lambda *args, i=i: fired.append(f"inner {i}"))
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.01]
    scheduler = lrs.ExponentialLR(opt, 0.5)
    run_step(opt, model)
    scheduler.step()
    assert fired == ["inner 0", "inner 1", "outer"]
    assert [p.param_groups[0]["lr"] for p in parts] == [0.05, 0.005]
    assert float(parts[1].state[model[2].weight]["step"]) == 1
    state = copy.deepcopy((opt.state_dict(), model.state_dict()))
    run_step(opt, model)
    after = [p.detach().clone() for p in model.parameters()]
    twin = network(seed=9)
    fresh = GradientAggregator(
        [
            torch.optim.SGD(twin[0].parameters(), lr=0.1),
            torch.optim.Adam(twin[2].parameters(), lr=0.01),
        ],  # type: ignore[arg-type]
        "agreement",
        num_strata=S,
    )
    twin.load_state_dict(state[1])
    fresh.load_state_dict(state[0])
    run_step(fresh, twin)
    for p, want in zip(twin.parameters(), after, strict=True):
        assert torch.equal(p.detach(), want)


def test_step_hooks_see_and_may_change_the_combined_gradient() -> None:
    model = network()
    opt = GradientAggregator(
        torch.optim.SGD(model.parameters(), lr=0.1), Backdoor(one_hot(2)), num_strata=S
    )
    seen = []

    def pre(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for p in model.parameters():
            p.grad = None

    opt.register_step_pre_hook(pre)
    expected = stratum_gradients(model)
    before = copy.deepcopy(model.state_dict())
    run_step(opt, model)
    assert len(seen) == 1
    for got, want in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(got, want[2], rtol=1e-10, atol=1e-14)
    assert_same_tree(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = network()
    opt = GradientAggregator(sgd(model), Backdoor(one_hot(0)), num_strata=S, report_every=1)
    run_step(opt, model)
    opt.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) == set_to_none for p in model.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    expected = stratum_gradients(model)
    with opt.stratify(IDS):
        losses = losses_of(model)
    opt.backward(losses)
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rule", ["backdoor", "mgda"])
def test_parameter_hooks_run_once_on_the_combined_gradient(rule: str) -> None:
    model = network()
    weight = model[0].weight
    opt = GradientAggregator(sgd(model), rule, num_strata=S)
    before, after = [], []

    def halve(grad: Tensor) -> Tensor:
        before.append(grad.clone())
        return grad / 2

    weight.register_hook(halve)
    weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    expected = stratum_gradients(copy.deepcopy(model))[0]
    with opt.stratify(IDS):
        losses = losses_of(model)
    opt.backward(losses)
    assert opt.report.weights is not None
    mix = torch.einsum("s,s...->...", opt.report.weights, expected)
    assert len(before) == len(after) == 1
    torch.testing.assert_close(before[0], mix, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(after[0], mix / 2, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(weight.grad, mix / 2, rtol=1e-9, atol=1e-13)


def test_two_aggregators_at_once() -> None:
    """Only one aggregator's own contexts cannot nest: two models may share a batch."""
    models = [network(0), network(1)]
    opts = [GradientAggregator(sgd(m), Backdoor(one_hot(1)), report_every=1) for m in models]
    expected = [stratum_gradients(m) for m in models]
    with opts[0].stratify(IDS, num_strata=S), opts[1].stratify(IDS, num_strata=S):
        losses = [losses_of(m) for m in models]
    for opt, loss in zip(opts, losses, strict=True):
        opt.backward(loss)
    for model, want in zip(models, expected, strict=True):
        for p, g in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, g[1], rtol=1e-10, atol=1e-14)


def test_parameters_may_thaw_during_training() -> None:
    model = network()
    model[0].requires_grad_(False)
    opt = GradientAggregator(sgd(model), Backdoor(one_hot(1)), num_strata=S, report_every=1)
    run_step(opt, model)
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)
    expected = stratum_gradients(model)
    opt.zero_grad()
    with opt.stratify(IDS):
        losses = losses_of(model)
    opt.backward(losses)
    assert opt.report.leak == "proven"
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rule", ["backdoor", "agreement"])
def test_a_thousand_steps_allocate_nothing_that_grows(rule: str) -> None:
    """Batches of many sizes: proofs are kept by call site, not by size."""
    model = network()
    opt = GradientAggregator(sgd(model), rule, num_strata=S)
    sizes = torch.randint(4, 40, (1100,)).tolist()

    def train(batch_sizes: list[int]) -> None:
        for size in batch_sizes:
            run_step(opt, model, torch.arange(size) % S, torch.randn(size, 3).double())

    train(sizes[:100])
    gc.collect()
    before = len(gc.get_objects())
    train(sizes[100:])
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert opt.report.leak in ("proven", "unchecked")
