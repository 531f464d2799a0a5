"""GradientAggregator is a real optimizer, and its steps are those of the aggregated gradient."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.batches import ragged_batch
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from pinet_fast.aggregation import GradientAggregator, StrataIndex
from pinet_fast.aggregation.rules import Backdoor
from pinet_fast.errors import (
    AggregationError,
    BoundaryError,
    ConfigError,
    RowLayoutError,
    StrataError,
)
from pinet_fast.models import SASRec

IDS = torch.tensor([0, 1, 1, 2, 0, 1, 1])


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2).double()


X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def losses_of(model: nn.Module) -> Tensor:
    return model(X).pow(2).sum(1)


def run_step(opt: GradientAggregator, model: nn.Module, ids: Tensor = IDS) -> None:
    opt.zero_grad()
    with opt.stratify(ids, num_strata=3):
        losses = losses_of(model)
    opt.backward(losses)
    opt.step()


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.01)


@pytest.mark.parametrize("every", [None, 1], ids=["reweighted", "one-pass"])
def test_constant_rule_is_the_reweighted_loss(every: int | None) -> None:
    prior = [0.2, 0.3, 0.5]
    model = linear()
    opt = GradientAggregator(adam(model), Backdoor(prior), report_every=every)
    with opt.stratify(IDS, num_strata=3):
        losses = losses_of(model)
    opt.backward(losses)
    assert opt.report.mode == ("reweighted" if every is None else "one-pass")
    loss = sum(w * losses_of(model)[s == IDS].mean() for s, w in enumerate(prior))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)


def test_users_prior_of_a_proportional_batch_is_the_mean_over_users() -> None:
    """With one loss per user, Backdoor("users") is plain training: the docs say so."""
    model = linear()
    counts = torch.bincount(IDS).mul(10).tolist()
    opt = GradientAggregator(adam(model), Backdoor("users"), counts=counts)
    with opt.stratify(IDS):
        losses = losses_of(model)
    opt.backward(losses)
    expected = torch.autograd.grad(losses_of(model).mean(), list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)


def test_joint_is_plain_training() -> None:
    batch = ragged_batch([0, 1, 1, 2], [4, 9, 2, 6], num_strata=3, num_items=30)
    outcomes = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        model = SASRec(30, max_len=10, dim=16)
        # Not Adam: it blows the rounding in gradients that are zero (key biases) up to full steps.
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = GradientAggregator(inner, "joint") if wrapped else inner
        for _ in range(3):
            opt.zero_grad()
            if isinstance(opt, GradientAggregator):
                with opt.stratify(batch.strata):
                    losses = model(batch)
                opt.backward(losses)
            else:
                model(batch).mean().backward()
            opt.step()
        outcomes.append([p.detach().clone() for p in model.parameters()])
    for mine, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


def test_one_stratum_equals_the_bare_optimizer_bit_for_bit() -> None:
    """Where the gradient is autograd's own (matrix products), S = 1 changes no bit."""
    torch.manual_seed(0)
    wrapped = nn.Linear(3, 2, bias=False)
    bare = copy.deepcopy(wrapped)
    x = torch.randn(8, 3)
    opt = GradientAggregator(adam(wrapped), "agreement")
    plain = adam(bare)
    for _ in range(3):
        opt.zero_grad()
        with opt.stratify(torch.zeros(8, dtype=torch.int64), num_strata=1):
            losses = wrapped(x).pow(2).sum(1)
        opt.backward(losses)
        opt.step()
        plain.zero_grad()
        bare(x).pow(2).sum(1).mean().backward()
        plain.step()
    assert torch.equal(wrapped.weight, bare.weight)


def test_report_of_a_gram_rule() -> None:
    model = linear()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS, num_strata=3):
        losses = losses_of(model)
    expected = autograd_stratum_gradients(
        lambda: losses_of(model), IDS, list(model.parameters()), 3
    )
    opt.backward(losses)
    report = opt.report
    flat = torch.cat([g.flatten(1) for g in expected], dim=1)
    assert report.gram is not None
    assert report.weights is not None
    assert report.norms is not None
    assert report.cosines is not None
    assert report.losses is not None
    torch.testing.assert_close(report.gram, flat @ flat.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(report.norms, flat.norm(dim=1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        report.cosines, F.cosine_similarity(flat[:, None], flat[None], dim=2), rtol=1e-9, atol=1e-9
    )
    assert report.counts == (2, 4, 1)
    assert report.unit == "users"
    for s in range(3):
        assert float(report.losses[s]) == pytest.approx(losses[s == IDS].mean().item())
    for i, p in enumerate(model.parameters()):
        mix = (report.weights[i][:, None] * expected[i].flatten(1)).sum(0).view_as(p)
        torch.testing.assert_close(p.grad, mix, rtol=1e-9, atol=1e-12)


def test_row_weights_mask_losses() -> None:
    model = linear()
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "backdoor")
    with opt.stratify(IDS, num_strata=3):
        losses = losses_of(model)
    opt.backward(losses, weights=mask)
    values = losses_of(model)
    loss = sum((values * mask)[s == IDS].sum() / mask[s == IDS].sum() / 3 for s in range(3))
    expected = torch.autograd.grad(loss, model.weight)[0]
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-12, atol=1e-14)


def test_a_stratum_masked_away_is_absent() -> None:
    model = linear()
    mask = (IDS != 2).double()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS, num_strata=3):
        losses = losses_of(model)
    opt.backward(losses, weights=mask)
    assert opt.report.weights is not None
    assert (opt.report.weights[:, 2] == 0).all()
    assert opt.report.losses is not None
    assert opt.report.losses[2].isnan()


def test_accumulation_adds_up() -> None:
    model = linear()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "backdoor")
    gradients = []
    for _ in range(2):
        with opt.stratify(IDS, num_strata=3):
            losses = losses_of(model)
        opt.backward(losses)
        assert model.weight.grad is not None
        gradients.append(model.weight.grad.clone())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


SCHEDULERS = {
    "StepLR": lambda o: StepLR(o, 1, 0.5),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, total_steps=10),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_wrapped_optimizer(name: str) -> None:
    model = linear()
    opt = GradientAggregator(adam(model))
    scheduler: LRScheduler = SCHEDULERS[name](opt)
    before = opt.inner.param_groups[0]["lr"]
    for _ in range(2):
        run_step(opt, model)
        scheduler.step()
    assert opt.inner.param_groups[0]["lr"] != before
    assert opt.param_groups is opt.inner.param_groups


def test_plateau_scheduler() -> None:
    opt = GradientAggregator(adam(linear()))
    scheduler = ReduceLROnPlateau(opt, patience=0, factor=0.1)
    for _ in range(3):
        scheduler.step(1.0)
    assert opt.inner.param_groups[0]["lr"] < 0.01


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_whole_and_independent(copier: object) -> None:
    model = linear()
    opt = GradientAggregator(adam(model), "agreement", num_strata=3)
    run_step(opt, model)
    twin: GradientAggregator = copier(opt)  # type: ignore[operator]
    assert twin.param_groups is twin.inner.param_groups
    assert twin.state is twin.inner.state
    assert repr(twin.rule) == repr(opt.rule)
    weight = twin.param_groups[0]["params"][0]
    assert weight is not model.weight
    assert torch.equal(weight, model.weight)
    assert float(twin.state[weight]["step"]) == 1
    fired = []
    twin.register_step_post_hook(lambda *args: fired.append(1))
    weight.grad = torch.ones_like(weight)
    with pytest.warns(UserWarning, match="plain step"):
        twin.step()
    assert fired == [1]
    assert not torch.equal(weight, model.weight)


def test_state_dict_round_trip_continues_exactly() -> None:
    runs = []
    for interrupted in (False, True):
        model = linear()
        opt = GradientAggregator(adam(model), "agreement")
        for i in range(4):
            if interrupted and i == 2:
                state, weights = opt.state_dict(), model.state_dict()
                model = linear(seed=9)
                model.load_state_dict(weights)
                opt = GradientAggregator(adam(model), "agreement")
                opt.load_state_dict(copy.deepcopy(state))
                assert opt.state is opt.inner.state
            run_step(opt, model)
        runs.append(model.weight.detach().clone())
    assert torch.equal(runs[0], runs[1])


def test_a_bare_optimizer_state_loads() -> None:
    model = linear()
    inner = adam(model)
    losses_of(model).mean().backward()
    inner.step()
    opt = GradientAggregator(adam(model))
    opt.load_state_dict(inner.state_dict())
    assert float(opt.state[model.weight]["step"]) == 1


def test_hooks_groups_and_clipping() -> None:
    model = linear()
    opt = GradientAggregator(torch.optim.SGD([model.weight], lr=0.1), "agreement")
    opt.add_param_group({"params": [model.bias], "lr": 0.01})
    assert len(opt.inner.param_groups) == 2
    fired = []
    opt.register_step_pre_hook(lambda *args: fired.append("pre"))
    opt.inner.register_step_post_hook(lambda *args: fired.append("inner"))
    with opt.stratify(IDS, num_strata=3):
        losses = losses_of(model)
    opt.backward(losses)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    opt.step()
    assert fired == ["pre", "inner"]


def test_grad_scaler_unscales_and_skips_an_overflow() -> None:
    model = nn.Linear(3, 2)
    x = X.float()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = model.weight.detach().clone()
    for poison in (torch.inf, 1.0):
        opt.zero_grad()
        with opt.stratify(IDS, num_strata=3):
            losses = model(x).pow(2).sum(1) * poison
        opt.backward(scaler.scale(losses))
        scaler.step(opt)
        scaler.update()
        if poison == torch.inf:
            assert torch.equal(model.weight, before)
    assert not torch.equal(model.weight, before)
    assert float(model.weight.detach().sub(before).abs().max()) < 10


def test_frozen_parameters_are_left_alone() -> None:
    model = linear()
    model.bias.requires_grad_(False)
    opt = GradientAggregator(adam(model), "agreement")
    run_step(opt, model)
    assert model.bias.grad is None
    assert model.weight.grad is not None


def test_a_parameter_unused_in_the_batch_keeps_no_gradient() -> None:
    model, unused = linear(), nn.Parameter(torch.ones(2))
    opt = GradientAggregator(torch.optim.SGD([*model.parameters(), unused], lr=1.0), "agreement")
    run_step(opt, model)
    assert unused.grad is None
    assert torch.equal(unused.detach(), torch.ones(2))


def test_no_grad_inside_passes_through() -> None:
    model = linear()
    opt = GradientAggregator(adam(model), "agreement")
    with opt.stratify(IDS, num_strata=3):
        with torch.no_grad():
            assert not model(torch.randn(11, 3, dtype=torch.float64)).requires_grad
        losses = losses_of(model)
    opt.backward(losses)
    assert model.weight.grad is not None


def test_nothing_remains_after_an_exception_inside() -> None:
    model = linear()
    opt = GradientAggregator(adam(model), "agreement")

    def failing_forward() -> None:
        with opt.stratify(IDS, num_strata=3):
            losses_of(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_forward()
    run_step(opt, model)
    assert model(X).grad_fn is not None
    assert type(model(X).grad_fn).__name__ == "AddmmBackward0"


def test_memory_of_a_step_is_released() -> None:
    import gc
    import weakref

    model = linear()
    opt = GradientAggregator(adam(model), "agreement")
    with opt.stratify(IDS, num_strata=3):
        losses = losses_of(model)
    session = weakref.ref(opt._session)  # type: ignore[arg-type]
    opt.backward(losses)
    opt.step()
    del losses
    gc.collect()
    assert session() is None


def refused(action: str, match: str, error: type[Exception]) -> object:
    return pytest.param(action, match, error, id=action)


@pytest.mark.parametrize(
    ("action", "match", "error"),
    [
        refused("backward first", "with opt.stratify", AggregationError),
        refused(
            "step without backward", r"opt\.backward\(losses\) was not called", AggregationError
        ),
        refused("backward twice", "once for every backward", AggregationError),
        refused("closure", "closure", ConfigError),
        refused("nested", "cannot nest", AggregationError),
        refused("scalar loss", "reduction='none'", RowLayoutError),
        refused("other rows", r"losses of shape \[5\]", RowLayoutError),
        refused("detached losses", "no_grad", AggregationError),
        refused("id out of range", r"id 7 is out of range for 3 strata", StrataError),
        refused("float ids", "integer ids", StrataError),
        refused("other S", "expected 3 strata, as before; got 4", StrataError),
        refused("negative weights", "weights must be >= 0", AggregationError),
        refused("all masked", "every stratum is empty", AggregationError),
        refused("outside gradient", "outside every boundary", AggregationError),
        refused("no parameter met", "no parameter of the optimizer", AggregationError),
        refused("in-place max_norm", "max_norm", BoundaryError),
    ],
)
def test_misuse_has_one_clear_error(action: str, match: str, error: type[Exception]) -> None:
    model = linear()
    opt = GradientAggregator(adam(model), "agreement", num_strata=3)

    def forward() -> Tensor:
        with opt.stratify(IDS):
            return losses_of(model)

    def outside() -> None:
        early = model.weight * 2  # made before the context: no view, so nothing to follow
        with opt.stratify(IDS):
            losses = (X @ early.T).pow(2).sum(1) + losses_of(model)
        opt.backward(losses)

    def unmet() -> None:
        other = linear(1)
        with opt.stratify(IDS):
            losses = losses_of(other)
        opt.backward(losses)

    def max_norm() -> None:
        table = nn.Embedding(9, 2, max_norm=1.0).double()
        opt.add_param_group({"params": table.parameters()})
        with opt.stratify(IDS):
            table(IDS)

    def nested() -> None:
        with opt.stratify(IDS), opt.stratify(IDS):
            pass

    def twice() -> None:
        losses = forward()
        opt.backward(losses)
        opt.backward(losses)

    def unfinished() -> None:
        forward()
        opt.step()

    actions = {
        "backward first": lambda: opt.backward(losses_of(model)),
        "step without backward": unfinished,
        "backward twice": twice,
        "closure": lambda: opt.step(lambda: 0.0),  # type: ignore[arg-type, return-value]
        "nested": nested,
        "scalar loss": lambda: opt.backward(forward().mean()),
        "other rows": lambda: opt.backward(forward()[:5]),
        "detached losses": lambda: opt.backward(forward().detach()),
        "id out of range": lambda: opt.stratify(IDS + 5).__enter__(),
        "float ids": lambda: opt.stratify(IDS.float()).__enter__(),
        "other S": lambda: opt.stratify(StrataIndex(IDS, 4)).__enter__(),
        "negative weights": lambda: opt.backward(forward(), -torch.ones(7)),
        "all masked": lambda: opt.backward(forward(), torch.zeros(7)),
        "outside gradient": outside,
        "no parameter met": unmet,
        "in-place max_norm": max_norm,
    }
    with pytest.raises(error, match=match):
        actions[action]()
    opt.zero_grad()
    run_step(GradientAggregator(adam(model), "agreement"), model)


@pytest.mark.parametrize("wrong", [None, 3, nn.Linear(1, 1)])
def test_only_optimizers_can_be_wrapped(wrong: object) -> None:
    with pytest.raises(ConfigError, match="wrap the optimizer you have"):
        GradientAggregator(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="already"):
        GradientAggregator(GradientAggregator(adam(linear())))


def test_a_plain_step_warns_once_and_says_so() -> None:
    model = linear()
    opt = GradientAggregator(adam(model))
    losses_of(model).mean().backward()
    with pytest.warns(UserWarning, match="plain step"):
        opt.step()
    assert opt.report.mode == "plain"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses_of(model).mean().backward()
        opt.step()


def test_a_bare_step_on_a_fresh_optimizer_is_quiet() -> None:
    """Distributed checkpointing calls step() once to make state."""
    opt = GradientAggregator(adam(linear()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_several_ranks_are_refused_where_stratum_gradients_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    model = linear()
    with (
        pytest.raises(AggregationError, match=r'one of 4 ranks.*rule="joint"'),
        GradientAggregator(adam(model), "agreement").stratify(IDS),
    ):
        pass
    run_step(GradientAggregator(adam(model), "backdoor"), model)  # a plain backward: DDP's affair
