"""Corners of the compiled lane: where it must leave the decision to Python, and its own memory."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.batches import ragged_batch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

from pinet_fast.aggregation import GradientAggregator, StrataIndex, lane, stratifying
from pinet_fast.models import SASRec

if TYPE_CHECKING:
    from collections.abc import Callable

    from pinet_fast.data import RaggedBatch

pytestmark = pytest.mark.skipif(
    lane.refusal() is not None, reason=f"no compiled lane: {lane.refusal()}"
)


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests compile models in this process, where the interception stays in Python."""
    monkeypatch.setattr(stratifying, "is_compiler_used", lambda: False)


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


def test_two_hundred_steps_of_a_whole_model(in_python):
    """Batches of other sizes and orders every time, and a forward that fails now and then."""

    def batch(step: int) -> RaggedBatch:
        rng = random.Random(step)
        strata = [rng.randrange(3) for _ in range(rng.randint(3, 9))]
        strata = sorted(strata) if step % 2 else strata
        lengths = [rng.randint(1, 9) for _ in strata]
        return ragged_batch(strata, lengths, num_strata=3, num_items=60, seed=step)

    def parameters() -> list[Tensor]:
        torch.manual_seed(0)
        model = SASRec(60, max_len=9, dim=16, num_heads=2, dropout=0.1)
        optimizer = GradientAggregator(torch.optim.Adam(model.named_parameters()), "agreement")
        for step, given in enumerate(map(batch, range(200))):
            optimizer.zero_grad()
            with suppress(KeyboardInterrupt):
                with optimizer.stratify(given.strata):
                    losses = model(given)
                    if step % 37 == 36:
                        raise KeyboardInterrupt
                optimizer.backward(losses)
                optimizer.step()
        return list(model.parameters())

    assert_same([parameters()], [in_python(parameters)])


def test_attention_does_not_end_the_lane(in_python):
    """It enters the mode again; without layouts of nodes, L-major rows passed for B-major."""
    ids = torch.randint(0, 10, (B, L))

    def losses(model: Layers, step: int) -> Tensor:
        items = model.items(ids)
        mixed = model.attention(items, items, items, need_weights=False)[0]
        by_time = items.transpose(0, 1).reshape(L * B, D)
        scores = model.last(by_time).view(L, B).transpose(0, 1)
        return scores.sigmoid().mean(1) + mixed.sum((1, 2)).sigmoid()

    assert_same(train(losses), in_python(train, losses))


class _Subclass(Tensor):
    pass


def test_subclasses_of_tensors_stay_what_they_are():
    rows = torch.randn(B, D).as_subclass(_Subclass)

    def losses(model: Layers, step: int) -> Tensor:
        hidden = model.first(rows)
        assert type(hidden) is _Subclass
        return model.last(hidden).squeeze(1).pow(2).as_subclass(Tensor)

    train(losses)


def test_modes_around_it_see_what_they_saw():
    rows = torch.randn(B, D)
    seen: list[list[str]] = [[]]

    class Log(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen[-1].append(func.__name__)
            return func(*args, **(kwargs or {}))

    def losses(model: Layers, step: int) -> Tensor:
        seen.append([])
        return model(rows)

    with Log():
        train(losses)
    assert seen[-1].count("linear") == 2
    assert "native_layer_norm" in seen[-1]


def test_dispatch_modes_around_it_change_nothing(in_python):
    rows = torch.randn(B, D)
    counted: list[int] = [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted[-1] += 1
            return func(*args, **(kwargs or {}))

    def counting(losses: Losses) -> list[list[Any]]:
        with Count():
            return train(losses)

    def losses(model: Layers, step: int) -> Tensor:
        counted.append(0)
        return model(rows)

    assert_same(counting(losses), in_python(counting, losses))
    assert counted[4] == counted[9]


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        return rows.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_a_gradient_that_never_arrives_counts_as_zero(in_python):
    rows, ids = torch.randn(B, D), torch.arange(B)

    def losses(model: Layers, step: int) -> Tensor:
        values = model(rows + model.items(ids))
        return _NoGradient.apply(values) if step == 4 else values

    got = train(losses)
    assert_same(got, in_python(train, losses))
    assert all(grad.count_nonzero() == 0 for grad in got[4] if grad is not None)


@pytest.mark.parametrize("is_on", [True, False])
def test_gradients_of_gradients_are_refused_where_they_would_be_asked_for(monkeypatch, is_on):
    monkeypatch.setenv("PINET_FAST_LANE", str(int(is_on)))
    rows = torch.randn(B, D, requires_grad=True)

    def losses(model: Layers, step: int) -> Tensor:
        values = model(rows)
        if step == 4:
            hidden = model.first(rows)
            ones = torch.ones_like(hidden)
            (first,) = torch.autograd.grad(hidden, rows, ones, create_graph=True)
            assert not first.requires_grad  # nothing to differentiate
            (first,) = torch.autograd.grad(hidden, rows, ones.requires_grad_(), create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                first.sum().backward()
        return values

    # Both are allowed: the leaves are not reached.
    monkeypatch.setattr("pinet_fast.aggregation.interception.GRADIENT_CALLS", frozenset())
    train(losses)


@pytest.mark.parametrize("change", ["weight", "rows", "ids"])
def test_changes_in_place_before_the_backward_are_seen(change):
    rows, ids = torch.randn(B, D), torch.arange(B)

    def losses(model: Layers, step: int) -> Tensor:
        hidden = model.first(rows + model.items(ids))
        values = model.last(hidden).squeeze(1).pow(2) + model.norm(hidden).sum(1)
        if step == 4:
            with torch.no_grad():
                {"weight": model.last.weight, "rows": hidden, "ids": ids}[change].add_(0)
        return values

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(losses)


def test_lists_that_hold_themselves_end_in_an_error():
    endless: list[Any] = [torch.ones(2)]
    endless.append(endless)

    def losses(model: Layers, step: int) -> Tensor:
        with pytest.raises(RecursionError):
            handle_torch_function(torch.einsum, endless[:1], "a->", endless)
        return model(torch.ones(B, D))

    train(losses)


def test_a_forgotten_aggregator_is_collected_with_its_hooks():
    rows = torch.randn(B, D)
    torch.manual_seed(0)
    model = Layers()
    optimizer = aggregator(model)
    for p in model.parameters():
        p.register_hook(lambda _, optimizer=optimizer: None)
    for _ in range(4):
        optimizer.zero_grad()
        with optimizer.stratify(STRATA):
            values = model(rows)
        optimizer.backward(values)
        optimizer.step()
    assert optimizer._lanes._lane is not None
    alive = [weakref.ref(model), weakref.ref(model.first.weight), weakref.ref(optimizer)]
    del model, optimizer, values, p
    gc.collect()
    assert [ref() is None for ref in alive] == [True] * 3


def test_no_references_are_left_behind():
    """The counts of what a lane borrows and returns, after forwards of every kind."""
    rows, ids = torch.randn(B, D), torch.arange(B)
    kept: list[Any] = [rows, ids]
    counts: list[list[int]] = []

    def losses(model: Layers, step: int) -> Tensor:
        if step == 0:
            kept.extend(model.parameters())
        values = model(rows + model.items(ids))
        gc.collect()
        counts.append([sys.getrefcount(value) for value in kept])
        return values

    train(losses, 12)
    assert counts[-1] == counts[4]


def test_an_error_inside_the_forward_leaves_nothing_behind():
    rows = torch.randn(B, D)
    torch.manual_seed(0)
    model = Layers()
    optimizer = aggregator(model)

    def step(rows_of_first: Tensor) -> weakref.ref[Any]:
        optimizer.zero_grad()
        with optimizer.stratify(STRATA):
            values = model(rows)
            held = weakref.ref(optimizer._session.leaves)
            model.first(rows_of_first)
        optimizer.backward(values)
        optimizer.step()
        return held

    for _ in range(5):
        step(rows)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        step(torch.randn(B, D + 1))
    held = raised.traceback[1].frame.f_locals["held"]
    del raised
    gc.collect()
    assert held() is None
    assert step(rows)() is None


def test_a_begin_that_fails_forgets_what_it_was_given():
    class Leaves:
        pass

    leaves, parameter = Leaves(), nn.Parameter(torch.ones(2, 2))
    held = weakref.ref(leaves)
    made = lane._library()[0].Lane([parameter], [])
    with pytest.raises(AttributeError):
        made.begin(None, {}, leaves, {}, {}, {}, 2, [("users", object())], True, True)
    del leaves
    assert held() is None
    with pytest.raises(IndexError):
        lane._library()[0].Lane([parameter], [(1, 0, "users", (), 1)])
    with pytest.raises(RuntimeError, match="no such op"):
        lane._library()[0].Lane([parameter], [(0, 5, "users", (), 1)])


def test_replays_inside_replays_keep_it_off():
    made = lane._library()[0].Lane([], [])
    assert made.pause(True) is False
    assert made.pause(True) is True
    assert made.pause(True) is True
    assert made.pause(False) is True
