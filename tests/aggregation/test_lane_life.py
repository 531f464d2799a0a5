"""The compiled lane over the life of a model: conversions, freezing, many steps."""

from __future__ import annotations

import gc
import mmap
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.lanes import (
    WARM_UP,
    Batch,
    D,
    Small,
    V,
    batches,
    boundaries_in_python,
    compare,
    lane,
    per_row,
    train,
)
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.aggregation.lane import refusal
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")


def small(model: Small, batch: Batch) -> Tensor:
    return per_row(model(batch)).double()


def sgd(named: Any) -> torch.optim.SGD:
    return torch.optim.SGD(named, lr=0.1)


def at(step: int, change: Callable[[Small, GradientAggregator], Any]) -> Any:
    """Return what calls ``change`` before one step."""

    def before(i: int, model: Small, opt: GradientAggregator) -> None:
        if i == step:
            change(model, opt)

    return before


def test_parameters_swapped_for_others() -> None:
    """Also nothing but the optimizer holds their tensors between steps, or torch refuses."""

    def swap(model: Small, opt: GradientAggregator) -> None:
        opt.zero_grad()
        generator = torch.Generator().manual_seed(0)
        for p in list(model.parameters()):
            other = nn.Parameter(torch.randn(p.shape, generator=generator))
            torch.utils.swap_tensors(p, other)

    ours, _ = compare(Small, batches(7), forward=small, before=at(WARM_UP + 1, swap), optimizer=sgd)
    assert ours.num_in_python[WARM_UP:] == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_converted_after_the_warm_up(dtype: torch.dtype) -> None:
    ours, _ = compare(
        Small, batches(7), forward=small, optimizer=sgd,
        before=at(WARM_UP + 1, lambda model, opt: model.to(dtype)),
    )  # fmt: skip
    assert ours.num_in_python[WARM_UP:] == ([0] * 4 if dtype is torch.float64 else [0, 3, 3, 3])


def test_values_loaded_after_the_warm_up() -> None:
    state = {name: torch.randn_like(p) for name, p in Small().state_dict().items()}
    ours, _ = compare(
        Small, batches(6), forward=small, optimizer=sgd,
        before=at(WARM_UP + 1, lambda model, opt: model.load_state_dict(state)),
    )  # fmt: skip
    assert ours.num_in_python[WARM_UP:] == [0] * 3


def test_strided_parameters() -> None:
    def make() -> Small:
        model = Small()
        model.up.weight = nn.Parameter(torch.randn(D, D).t())
        model.norm.weight = nn.Parameter(torch.randn(2 * D)[::2])
        model.items.weight = nn.Parameter(torch.randn(D, V).t())
        return model

    ours, _ = compare(make, batches(6), forward=small)
    assert ours.num_in_python[WARM_UP:] == [0] * 3


@pytest.mark.parametrize("name", ["items.weight", "norm.weight", "up.weight", "up.bias"])
def test_frozen_and_thawed(name: str) -> None:
    """What is proven counts positions, so it is proven anew; then the lane takes part again."""

    def before(step: int, model: Small, opt: GradientAggregator) -> None:
        if step in (WARM_UP, WARM_UP + 3):
            model.get_parameter(name).requires_grad_(step != WARM_UP)

    ours, theirs = compare(Small, batches(10), forward=small, before=before)
    assert theirs.num_in_python[WARM_UP] >= 2
    assert ours.num_in_python[-2:] == [0, 0]


def test_what_was_settled_before_a_freeze_is_forgotten_with_its_proofs() -> None:
    """As many sites of the same parameters are settled again, but others."""

    def forward(model: Small, batch: Batch) -> Tensor:
        h = model.norm(batch.numbers(batch.num_rows, D))
        if batch.seed == WARM_UP:
            return per_row(h)
        if not WARM_UP < batch.seed < 8:
            return per_row(model.up(h))
        of_users = model.up(batch.numbers(batch.num_users, D))
        return per_row(h + of_users[batch.users_of_rows()])

    def before(step: int, model: Small, opt: GradientAggregator) -> None:
        if step in (WARM_UP, WARM_UP + 1):
            model.items.weight.requires_grad_(step != WARM_UP)

    compare(Small, batches(12), forward=forward, before=before)


def test_a_parameter_group_that_comes_later() -> None:
    def make() -> Small:
        model = Small()
        model.extra = nn.Linear(D, D)
        return model

    def build(named: Any) -> torch.optim.SGD:
        return sgd([(n, p) for n, p in named if not n.startswith("extra")])

    def forward(model: Any, batch: Batch) -> Tensor:
        h = model(batch)
        return per_row(model.extra(h) if batch.seed > WARM_UP else h)

    ours, _ = compare(
        make, batches(8), forward=forward, optimizer=build,
        before=at(
            WARM_UP + 1,
            lambda m, opt: opt.add_param_group({"params": list(m.extra.named_parameters())}),
        ),
    )  # fmt: skip
    assert ours.num_in_python[-2:] == [0, 0]


def trained(dim: int) -> tuple[Small, GradientAggregator, Callable[[int], None]]:
    """Return a model, its aggregator, and what takes some steps."""
    torch.manual_seed(0)
    model = Small(dim)
    opt = GradientAggregator(sgd(model.named_parameters()), "agreement")
    steps = batches(5)

    def run(count: int) -> None:
        for i in range(count):
            opt.zero_grad()
            batch = steps[i % 5]
            with opt.stratify(batch.index()):
                losses = small(model, batch)
            opt.backward(losses)
            opt.step()

    return model, opt, run


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_a_thousand_steps_leave_nothing() -> None:
    model, opt, run = trained(64)

    def measure() -> tuple[int, list[int], int]:
        opt.zero_grad()
        gc.collect()
        counts = [sys.getrefcount(p) for p in model.parameters()]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(gc.get_objects()), counts, pages * mmap.PAGESIZE

    with lane(True), boundaries_in_python() as seen:
        run(200)
        seen.clear()
        objects, counts, size = measure()
        run(1000)
        objects_after, counts_after, size_after = measure()
    assert seen.total() == 0
    assert objects_after - objects < 50
    assert counts_after == counts
    assert size_after - size < 8 * 2**20  # a leaf's gradient a step: 47 MiB; arenas grow a little


def test_no_step_allocates_what_stays() -> None:
    tracemalloc.start()
    try:
        _, _, run = trained(D)
        with lane(True):
            run(100)
            grown = []
            # Free lists fill for a while; what leaks does so at every step.
            while len(grown) < 10 and min(grown, default=1) > 0:
                gc.collect()
                before = tracemalloc.get_traced_memory()[0]
                run(100)
                gc.collect()
                after = tracemalloc.get_traced_memory()[0]
                grown.append(max(after - before - 48 * 100, 0))  # less than any object a step
    finally:
        tracemalloc.stop()
    assert min(grown) == 0, grown


def test_two_runs_leave_the_same_number_of_references() -> None:
    """The lane keeps no reference to what Python handed it, nor one too few."""
    found = []
    for on in (True, False):
        trail = train(Small, batches(8), on=on, forward=small)
        trail.optimizer.zero_grad()
        gc.collect()
        found.append([sys.getrefcount(p) for p in trail.model.parameters()])
        indices = [batch.index() for batch in batches(4)]
        with lane(on):
            for batch, index in zip(batches(4), indices, strict=True):
                with trail.optimizer.stratify(index):
                    losses = small(trail.model, batch)
                trail.optimizer.backward(losses)
                trail.optimizer.step()
        del losses
        trail.optimizer.zero_grad()
        gc.collect()
        found[-1] += [sys.getrefcount(index.events.ids) for index in indices]
    # Of each parameter the lane's own list holds one, and what it was made from another.
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) <= 2


def test_a_lane_dies_with_its_aggregator() -> None:
    trail = train(Small, batches(5), on=True, forward=small)
    parameters = list(trail.model.parameters())
    table = sys.getrefcount(parameters[0])
    made = trail.optimizer._lanes._made
    assert made is not None
    del made
    trail.optimizer = None
    gc.collect()
    assert sys.getrefcount(parameters[0]) < table


# Leaves from one forward to the next --------------------------------------------------------------


def leaves_of(opt: GradientAggregator) -> dict[int, int]:
    """Return the identities of the dense leaves of the forward that runs, by root."""
    session = opt._session
    assert session is not None
    return {key: id(leaf) for key, (_, leaf) in session.leaves.dense_leaves.items()}


def steps_with_leaves(
    between: Callable[[int, Small, GradientAggregator, Tensor], Any] | None = None,
) -> list[dict[int, int]]:
    """Return the leaves of every step; the last losses are alive in the next forward, as in loops.

    ``between`` is called after every step.
    """
    torch.manual_seed(0)
    model = Small()
    opt = GradientAggregator(sgd(model.named_parameters()), "agreement")
    found = []
    with lane(True):
        for step, batch in enumerate(batches(WARM_UP + 4)):
            opt.zero_grad()
            with opt.stratify(batch.index()):
                losses = small(model, batch)
                found.append(leaves_of(opt))
            opt.backward(losses)
            opt.step()
            if between is not None:
                between(step, model, opt, losses)
    return found[WARM_UP:]


def test_leaves_are_kept_although_losses_live_on() -> None:
    found = steps_with_leaves()
    assert len(found[0]) == 4
    assert all(leaves == found[0] for leaves in found)


def test_a_leaf_that_somebody_has_is_made_anew() -> None:
    held: list[Any] = []

    def hold(step: int, model: Small, opt: GradientAggregator, losses: Tensor) -> None:
        if step == WARM_UP + 1:
            nodes = [losses.grad_fn]
            while nodes:
                node = nodes.pop()
                leaf = getattr(node, "variable", None)
                if leaf is not None and leaf.shape == (3, D, D):
                    leaf.grad = torch.ones(3, D, D)  # left behind by an error, say
                    held.append(leaf)
                nodes += [parent for parent, _ in getattr(node, "next_functions", ())]

    found = steps_with_leaves(hold)
    assert held
    assert id(held[0]) in found[1].values()
    changed = [key for key in found[1] if found[2][key] != found[1][key]]
    assert [found[1][key] for key in changed] == [id(held[0])]
    assert found[3] == found[2]


def test_a_backward_of_earlier_losses_is_refused() -> None:
    """Its graph leads to leaves that a later forward uses; here it was not freed."""
    torch.manual_seed(0)
    model = Small()
    opt = GradientAggregator(sgd(model.named_parameters()), "agreement")

    def plain_norm(rows: Tensor) -> Tensor:
        return model.norm(rows)

    with lane(True):
        for batch in batches(WARM_UP + 1):
            rows = batch.numbers(batch.num_rows, D)
            opt.zero_grad()
            with opt.stratify(batch.index()):
                first = per_row(plain_norm(rows))
            part = first.sum()
            with opt.stratify(batch.index()):  # the first forward never had its backward
                losses = per_row(plain_norm(rows))
            opt.backward(losses)
        with pytest.raises(AggregationError, match="nothing says how this scalar was reduced"):
            part.backward()
        expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        opt.zero_grad()
        with opt.stratify(batch.index()):
            losses = per_row(plain_norm(rows))
        opt.backward(losses)
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)


def test_values_that_were_replaced_are_let_go() -> None:
    """A model that is converted or moved does not leave its first values behind."""
    torch.manual_seed(0)
    model = Small()
    opt = GradientAggregator(sgd(model.named_parameters()), "agreement")
    with lane(True):
        for batch in batches(WARM_UP + 1):
            opt.zero_grad()
            with opt.stratify(batch.index()):
                losses = small(model, batch)
            opt.backward(losses)
        memory = torch.zeros(D, D)
        released = weakref.ref(memory.untyped_storage())
        model.up.weight.data = memory
        del memory
        for _ in range(2):
            with opt.stratify(batch.index()):
                small(model, batch)
        assert released() is not None
        model.bfloat16()
        with opt.stratify(batch.index()):
            gc.collect()
            assert released() is None


def test_another_number_of_strata_has_leaves_of_its_own() -> None:
    torch.manual_seed(0)
    model = Small()
    named = list(model.named_parameters())
    with lane(True):
        for num_strata in (2, 3):
            opt = GradientAggregator(sgd(named), "agreement")
            for batch in batches(WARM_UP + 2, num_strata=num_strata):
                opt.zero_grad()
                with opt.stratify(batch.index()):
                    losses = small(model, batch)
                    shapes = {
                        leaf.shape[0] for _, leaf in opt._session.leaves.dense_leaves.values()
                    }
                opt.backward(losses)
                assert shapes == {num_strata}


def test_a_use_in_python_before_one_in_the_lane_shares_its_leaf() -> None:
    """In one forward a parameter has one leaf, whoever met it first; and counts its uses on."""

    def forward(model: Small, batch: Batch) -> Tensor:
        x = batch.numbers(batch.num_rows, D)
        if batch.seed % 2:
            h = torch.nn.functional.linear(input=x, weight=model.up.weight, bias=model.up.bias)
            return per_row(model.norm(model.up(h)))
        h = model.up(x)
        return per_row(
            model.norm(torch.nn.functional.linear(h, bias=model.up.bias, weight=model.up.weight))
        )

    ours, _ = compare(Small, batches(10), forward=forward)
    assert ours.num_in_python[-1] == 1
