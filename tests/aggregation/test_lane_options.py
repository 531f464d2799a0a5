"""The compiled lane, and what an aggregator may be told, joined with, or copied as."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.lanes import (
    WARM_UP,
    Batch,
    D,
    Small,
    Trail,
    assert_same,
    batches,
    bits,
    boundaries_in_python,
    compare,
    lane,
    per_row,
    train,
)
from torch import Tensor

from pinet_fast import _env, profiling
from pinet_fast.aggregation import GradientAggregator, stratifying
from pinet_fast.aggregation.lane import refusal

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")


def small(model: Small, batch: Batch) -> Tensor:
    return per_row(model(batch)).double()


def sgd(named: Any) -> torch.optim.SGD:
    return torch.optim.SGD(named, lr=0.1)


def interleaved(count: int, on: bool, *, is_one_model: bool) -> list[Any]:
    """Take turns with two aggregators, whose batches have other strata."""
    torch.manual_seed(0)
    models = [Small(), Small()]
    if is_one_model:
        models[1] = models[0]
    opts = [GradientAggregator(sgd(m.named_parameters()), "agreement") for m in models]
    found: list[Any] = []
    with lane(on), boundaries_in_python() as seen:
        for i, batch in enumerate(batches(count)):
            losses = []
            for k, opt in enumerate(opts):
                opt.zero_grad()
                strata = [s if k == 0 else 2 - s for s in batch.strata]
                with opt.stratify(strata, num_strata=3, lengths=batch.lengths):
                    losses.append(small(models[k], batch))
                if is_one_model:
                    opt.backward(losses[-1])
                    opt.step()
            if not is_one_model:
                for opt, values in zip(opts, losses, strict=True):
                    opt.backward(values)
                    opt.step()
            found.append([bits(p) for m in models for p in m.parameters()])
            if i < WARM_UP:
                seen.clear()
    found.append([str(opt.coverage()) for opt in opts])
    assert seen.total() == (0 if on else 6 * (count - WARM_UP))
    return found


@pytest.mark.parametrize("is_one_model", [False, True])
def test_two_aggregators(is_one_model: bool) -> None:
    ours = interleaved(6, True, is_one_model=is_one_model)
    theirs = interleaved(6, False, is_one_model=is_one_model)
    assert ours[:-1] == theirs[:-1]


def test_two_optimizers_in_one_aggregator() -> None:
    found = []
    for on in (True, False):
        torch.manual_seed(0)
        model = Small()
        table, *others = model.named_parameters()
        adam = torch.optim.Adam(others, lr=0.01)
        opt = GradientAggregator([sgd([table]), adam], "agreement")
        with lane(on), boundaries_in_python() as seen:
            for i, batch in enumerate(batches(6)):
                if i == WARM_UP:
                    seen.clear()
                opt.zero_grad()
                with opt.stratify(batch.index()):
                    losses = small(model, batch)
                opt.backward(losses)
                opt.step()
        assert seen.total() == (0 if on else 9)
        found.append([bits(p) for p in model.parameters()])
    assert found[0] == found[1]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_alike(how: str) -> None:
    """A copy has proven nothing; the original is not hurt."""
    found = []
    for on in (True, False):
        trail = train(Small, batches(4), on=on, forward=small)
        pair = trail.model, trail.optimizer
        copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        with lane(on):
            for model, opt in (copied, pair):
                for batch in batches(8)[4:]:
                    opt.zero_grad()
                    with boundaries_in_python() as seen, opt.stratify(batch.index()):
                        losses = small(model, batch)
                    opt.backward(losses)
                    opt.step()
                assert seen.total() == (0 if on else 3)
        found.append([[bits(p) for p in m.parameters()] for m, _ in (copied, pair)])
        assert found[-1][0] == found[-1][1]
    assert found[0] == found[1]


def test_an_error_inside_a_forward() -> None:
    def forward(model: Small, batch: Batch) -> Tensor:
        losses = small(model, batch)
        if batch.seed in (0, WARM_UP):
            raise ValueError("no")
        return losses

    ours, _ = compare(Small, batches(6), forward=forward, catches=ValueError)
    assert ours.num_in_python[WARM_UP + 1 :] == [0, 0]


def test_gradients_that_accumulate() -> None:
    found = []
    for on in (True, False):
        trail = train(Small, batches(4), on=on, forward=small)
        model, opt = trail.model, trail.optimizer
        with lane(on):
            for first in (4, 7):
                opt.zero_grad()
                for batch in batches(10)[first : first + 3]:
                    with opt.stratify(batch.index()):
                        losses = small(model, batch)
                    opt.backward(losses)
                opt.step()
        found.append([bits(p) for p in model.parameters()])
    assert found[0] == found[1]


def with_lane_and_python(**options: Any) -> tuple[Trail, Trail]:
    return compare(Small, batches(5), forward=small, **options)


@pytest.mark.parametrize(
    "options",
    [{"mode": "exact"}, {"rule": "joint"}, {"rule": "backdoor"}],
    ids=["exact", "joint", "backdoor"],
)
def test_where_nothing_is_intercepted_there_is_no_lane(options: dict[str, Any]) -> None:
    ours, _ = with_lane_and_python(**options)
    assert ours.num_in_python == [0] * 5


@pytest.mark.parametrize("check", ["always", "never"])
def test_where_nothing_is_settled_there_is_no_lane(check: str) -> None:
    ours, _ = with_lane_and_python(check=check)
    assert ours.num_in_python == [3] * 5


def test_reports_of_constant_rules() -> None:
    ours, _ = compare(Small, batches(8), forward=small, rule="joint", report_every=2)
    assert sum(ours.num_in_python[4:]) == 0


def test_the_lane_takes_the_kernels_of_a_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_env.BACKEND, "reference")
    ours, _ = with_lane_and_python()
    assert sum(ours.num_in_python[4:]) == 0
    assert all(op[1] == "reference" for op, _ in ours.entries[-1]["calls of kernels"])


def test_sums_and_products_take_the_kernels_of_a_forced_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(_env.BACKEND, "reference")

    def forward(model: Small, batch: Batch) -> Tensor:
        rows = batch.numbers(batch.num_rows, D, D) + model.up.weight
        return per_row(rows.sum(1) * model.norm.weight + model.norm.bias)

    ours, _ = compare(Small, batches(5), forward=forward)
    assert sum(ours.num_in_python[4:]) == 0
    before, after = (dict(ours.entries[i]["calls of kernels"]) for i in (-2, -1))
    sums = "stratum_sums", "reference"
    assert after[sums] == before[sums] + 3
    assert all(backend == "reference" for _, backend in after)


@pytest.mark.parametrize("dim", [256, 257])
def test_weights_at_the_limit_of_the_fused_kernel(dim: int) -> None:
    # 2**16 numbers: the lane and the backend in Python draw the line in the same place.
    ours, _ = compare(lambda: Small(dim), batches(5), forward=small)
    assert sum(ours.num_in_python[4:]) == 0


def test_declared_rows_and_reduced_losses_have_no_lane() -> None:
    for on in (True, False):
        trail = train(Small, batches(4), on=on, forward=small)
        model, opt, batch = trail.model, trail.optimizer, batches(4)[-1]
        event_ids = torch.tensor(list(batch.strata))[batch.users_of_rows()]
        with lane(on):
            with boundaries_in_python() as seen:
                with opt.stratify(batch.index(), rows={"up.weight": (0, event_ids)}):
                    losses = small(model, batch)
                opt.backward(losses)
                opt.step()
                opt.zero_grad()
                with opt.stratify(batch.index(), reduction="mean"):
                    small(model, batch).mean().backward()
                opt.step()
            assert seen.total() == 6


def test_leaks_attributed_by_row() -> None:
    def mixing(model: Small, batch: Batch) -> Tensor:
        h = model(batch)
        return per_row(h - h.mean(0))

    compare(Small, batches(6), forward=mixing, leaks="attribute-by-row")


def test_it_can_be_turned_off_and_on_between_steps() -> None:
    def before(step: int, model: Small, opt: GradientAggregator) -> None:
        os.environ[_env.LANE] = "0" if step in (4, 5) else "1"

    ours = train(Small, batches(9), on=True, forward=small, before=before)
    theirs = train(Small, batches(9), on=False, forward=small)
    assert_same(ours, theirs)
    assert ours.num_in_python == [3, 0, 0, 0, 3, 3, 0, 0, 0]


def test_two_aggregators_at_once() -> None:
    """The inner one's mode has another below it, so Python decides; the outer one's has not."""
    found = []
    for on in (True, False):
        torch.manual_seed(0)
        models = [Small(), Small()]
        outer, inner = (GradientAggregator(sgd(m.named_parameters()), "mgda") for m in models)
        with lane(on):
            for batch in batches(6):
                for opt in (outer, inner):
                    opt.zero_grad()
                with boundaries_in_python() as seen:
                    with outer.stratify(batch.index()), inner.stratify(batch.index()):
                        h = models[0](batch)
                        other = small(models[1], batch) + per_row(h.detach())
                    outer.backward(per_row(h))
                    inner.backward(other)
                for opt in (outer, inner):
                    opt.step()
        assert [seen[op] for op in ("embedding", "layer_norm", "linear")] == [1 if on else 2] * 3
        found.append([bits(p) for m in models for p in m.parameters()])
    assert found[0] == found[1]


def test_profiling_sees_every_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "is_on", True)
    ours, _ = with_lane_and_python()
    assert ours.num_in_python == [3] * 5


def test_where_something_is_compiled_there_is_no_lane() -> None:
    trail = train(Small, batches(4), on=True, forward=small)
    batch = batches(4)[-1]
    compiling = patch.object(stratifying, "is_compiler_used", lambda: True)
    with lane(True), compiling, boundaries_in_python() as seen:
        with trail.optimizer.stratify(batch.index()):
            losses = small(trail.model, batch)
        trail.optimizer.backward(losses)
    assert seen.total() == 3
