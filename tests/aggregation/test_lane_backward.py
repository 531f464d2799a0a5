"""Backwards through the compiled lane: right ones, and those that must be refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.lanes import (
    WARM_UP,
    Batch,
    D,
    Deeper,
    V,
    batches,
    bits,
    boundaries_in_python,
    compare,
    lane,
    outcome,
    per_row,
    train,
)
from torch import Tensor

from pinet_fast.aggregation.lane import refusal
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")

STEPS = batches(WARM_UP + 1)


def small(model: Deeper, batch: Batch) -> Tensor:
    return per_row(model(batch))


def lookup_alone(model: Deeper, batch: Batch) -> Tensor:
    return per_row(model.items(batch.ids(V, batch.num_rows)))


def linear_alone(model: Deeper, batch: Batch) -> Tensor:
    return per_row(model.up(batch.numbers(batch.num_rows, D)))


def norm_alone(model: Deeper, batch: Batch) -> Tensor:
    return per_row(model.norm(batch.numbers(batch.num_rows, D)))


def sum_alone(model: Deeper, batch: Batch) -> Tensor:
    return per_row(batch.numbers(batch.num_rows, D) + model.norm.weight)


def product_alone(model: Deeper, batch: Batch) -> Tensor:
    return per_row(model.norm.weight * batch.numbers(batch.num_rows, D))


FORWARDS = [small, lookup_alone, linear_alone, norm_alone, sum_alone, product_alone]


def both(
    forward: Callable[[Any, Batch], Tensor],
    then: Callable[[Any, Any, Batch], Any],
    *,
    in_python: int = 0,
) -> list[Any]:
    """Return what ``then`` makes of a trained model and aggregator, with the lane and without."""
    found = []
    for on in (True, False):
        trail = train(Deeper, STEPS, on=on, forward=forward)
        if on:
            assert trail.num_in_python[-1] == 0
        with lane(on), boundaries_in_python() as seen:
            trail.optimizer.zero_grad()
            found.append(then(trail.model, trail.optimizer, STEPS[-1]))
        if on:
            assert seen.total() == in_python
    return found


class Nothing(torch.autograd.Function):
    """Lets no gradient through, not even zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("which", ["items", "norm", "up", "sum", "product"])
def test_no_gradient_at_all(which: str) -> None:
    """Weight decay moves a parameter whose gradient is zero, and not one that has none."""

    def forward(model: Deeper, batch: Batch) -> Tensor:
        def stop(x: Tensor, layer: str) -> Tensor:
            is_last = layer == which and batch.seed >= 4
            return Nothing.apply(x) if is_last else x  # type: ignore[no-any-return, no-untyped-call]

        x = stop(model.items(batch.ids(V, batch.num_rows)), "items")
        h = stop(model.norm(x), "norm")
        h = stop(h + model.norm.bias, "sum") + stop(x * model.norm.weight, "product")
        return per_row(model.down(x + stop(F.gelu(model.up(h)), "up")))

    def decaying(named: Any) -> torch.optim.SGD:
        return torch.optim.SGD(named, lr=0.1, weight_decay=0.1)

    ours, _ = compare(Deeper, batches(6), forward=forward, optimizer=decaying)
    assert ours.num_in_python[-2:] == [0, 0]


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("is_inside", [False, True])
def test_a_plain_backward_is_refused_and_the_next_step_is_good(
    forward: Callable[[Deeper, Batch], Tensor], is_inside: bool
) -> None:
    def then(model: Deeper, opt: Any, batch: Batch) -> Any:
        def run() -> None:
            with opt.stratify(batch.index()):
                loss = forward(model, batch).mean()
                if is_inside:
                    loss.backward()
            loss.backward()

        refused = outcome(run)
        assert refused is not None
        assert refused[0] is AggregationError
        assert all(p.grad is None for p in model.parameters())
        opt.zero_grad()
        with opt.stratify(batch.index()):
            losses = forward(model, batch)
        opt.backward(losses)
        opt.step()
        return refused, [bits(p) for p in model.parameters()]

    ours, theirs = both(forward, then)
    assert ours == theirs


def test_a_graph_that_a_failed_forward_left_is_refused() -> None:
    kept = []

    def then(model: Deeper, opt: Any, batch: Batch) -> Any:
        def fail() -> None:
            with opt.stratify(batch.index()):
                kept.append(small(model, batch))
                raise ValueError("no")

        assert outcome(fail) == (ValueError, "no")
        with opt.stratify(batch.index()):
            losses = small(model, batch)
        found = outcome(lambda: kept[-1].sum().backward())
        opt.backward(losses)
        assert found is not None
        return found[0], [bits(p.grad) for p in model.parameters()]

    ours, theirs = both(small, then)
    assert ours == theirs


@pytest.mark.parametrize("is_inside", [False, True])
def test_the_gradient_of_something_in_between(is_inside: bool) -> None:
    """It may be asked for, and changes nothing."""

    def then(model: Deeper, opt: Any, batch: Batch) -> Any:
        with opt.stratify(batch.index()):
            x = model.items(batch.ids(V, batch.num_rows))
            h = model.norm(x)
            losses = per_row(model.down(x + F.gelu(model.up(h))))
            if is_inside:
                grads = torch.autograd.grad(losses.sum(), [x, h], retain_graph=True)
        if not is_inside:
            grads = torch.autograd.grad(losses.sum(), [x, h], retain_graph=True)
        opt.backward(losses)
        return [bits(g) for g in grads], [bits(p.grad) for p in model.parameters()]

    ours, theirs = both(small, then)
    assert ours == theirs


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_second_backward_is_torchs_error(forward: Callable[[Deeper, Batch], Tensor]) -> None:
    def then(model: Deeper, opt: Any, batch: Batch) -> Any:
        with opt.stratify(batch.index()):
            losses = forward(model, batch)
        opt.backward(losses)
        return outcome(lambda: losses.sum().backward())

    ours, theirs = both(forward, then)
    assert ours == theirs
    assert "backward through the graph a second time" in ours[1]


@pytest.mark.parametrize("what", [
    "rows of linear", "rows of norm", "rows of a product", "ids", "weight", "scale", "factor",
])  # fmt: skip
def test_what_was_saved_must_not_be_changed(what: str) -> None:
    def then(model: Deeper, opt: Any, batch: Batch) -> Any:
        ids = batch.ids(V, batch.num_rows)
        with opt.stratify(batch.index()):
            x = model.items(ids)
            h = model.norm(x)
            y = model.up(h)
            losses = per_row(y * model.down.bias)
        changed = {
            "rows of linear": h, "rows of norm": x, "rows of a product": y, "ids": ids,
            "weight": model.up.weight, "scale": model.norm.weight, "factor": model.down.bias,
        }[what]  # fmt: skip
        with torch.no_grad():
            changed.mul_(1)
        return outcome(lambda: opt.backward(losses))

    def forward(model: Deeper, batch: Batch) -> Tensor:
        y = model.up(model.norm(model.items(batch.ids(V, batch.num_rows))))
        return per_row(y * model.down.bias)

    ours, theirs = both(forward, then)
    assert ours is not None
    assert "modified by an inplace operation" in ours[1]
    assert ours[0] is theirs[0]


@pytest.mark.parametrize("forward", FORWARDS)
def test_gradients_of_gradients_are_refused(forward: Callable[[Deeper, Batch], Tensor]) -> None:
    def inside(model: Deeper, opt: Any, batch: Batch) -> Any:
        def run() -> None:
            with opt.stratify(batch.index()):
                loss = forward(model, batch).sum()
                torch.autograd.grad(loss, list(model.parameters()), create_graph=True)

        return outcome(run)

    ours, theirs = both(forward, inside)
    assert ours == theirs
    assert "create_graph" in ours[1]


def test_gradients_of_gradients_of_rows_are_torchs_error() -> None:
    def after(model: Deeper, opt: Any, batch: Batch) -> Any:
        x = batch.numbers(batch.num_rows, D).requires_grad_()
        with opt.stratify(batch.index()):
            losses = per_row(model.down(model.up(model.norm(x))) * model.norm.weight)
        (grad,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return outcome(lambda: grad.sum().backward())

    def forward(model: Deeper, batch: Batch) -> Tensor:
        x = batch.numbers(batch.num_rows, D)
        return per_row(model.down(model.up(model.norm(x))) * model.norm.weight)

    ours, theirs = both(forward, after)
    assert ours == theirs
    assert "once_differentiable" in ours[1]


def test_gradients_are_checked_for_nan_where_asked() -> None:
    def forward(model: Deeper, batch: Batch) -> Tensor:
        with torch.autograd.detect_anomaly(check_nan=True):
            return small(model, batch)

    with pytest.warns(UserWarning, match="Anomaly"):
        compare(Deeper, batches(5), forward=forward)
