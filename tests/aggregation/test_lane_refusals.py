"""What the compiled lane must refuse in the words of torch, or of the interception in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.lanes import WARM_UP, Batch, D, Deeper, V, batches, bits, lane, outcome, per_row, train
from torch import Tensor

from pinet_fast.aggregation.lane import refusal
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")

STEPS = batches(WARM_UP + 1)


def small(model: Deeper, batch: Batch) -> Tensor:
    return per_row(model(batch))


WRONG: dict[str, Callable[[Deeper, Batch], Any]] = {
    "width of linear": lambda m, b: m.up(b.numbers(b.num_rows, D + 1)),
    "width of norm": lambda m, b: m.norm(b.numbers(b.num_rows, D + 1)),
    "dtype of linear": lambda m, b: m.up(b.numbers(b.num_rows, D, dtype=torch.float64)),
    "dtype of norm": lambda m, b: m.norm(b.numbers(b.num_rows, D, dtype=torch.float64)),
    "size of a bias": lambda m, b: F.linear(
        b.numbers(b.num_rows, D), m.up.weight, m.items.weight[0, :2]
    ),
    "bias of another": lambda m, b: F.linear(
        b.numbers(b.num_rows, D), m.items.weight, m.up.bias
    ),
    "an id too large": lambda m, b: m.items(torch.full((b.num_rows,), V)),
    "an id too small": lambda m, b: m.items(torch.full((b.num_rows,), -1)),
    "ids that are none": lambda m, b: m.items(b.numbers(b.num_rows)),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_torch_refuses_is_refused_in_its_words(what: str) -> None:
    def then(model: Deeper, opt: Any, batch: Batch) -> Any:
        def run() -> None:
            with opt.stratify(batch.index()):
                WRONG[what](model, batch)

        found = outcome(run)
        with opt.stratify(batch.index()):  # and what comes after is not hurt
            losses = small(model, batch)
        opt.backward(losses)
        return found, [bits(p.grad) for p in model.parameters()]

    found = []
    for on in (True, False):
        trail = train(Deeper, STEPS, on=on, forward=small)
        with lane(on):
            trail.optimizer.zero_grad()
            found.append(then(trail.model, trail.optimizer, STEPS[-1]))
    plain = outcome(lambda: WRONG[what](Deeper(), STEPS[-1]))
    assert plain is not None
    assert found[0] == found[1]
    assert found[0][0][0] is plain[0]


def test_a_plain_backward_that_reaches_only_what_python_made() -> None:
    """The first use of a weight is the lane's and leads nowhere, a further one is Python's."""

    def forward(model: Deeper, batch: Batch) -> Tensor:
        y = model.up(batch.numbers(batch.num_rows, D))
        return per_row(model.up(y.detach()) if batch.seed == 100 else y)

    found = []
    for on in (True, False):
        trail = train(Deeper, STEPS, on=on, forward=forward)
        batch = batches(1)[0]
        batch.seed = 100
        with lane(on):
            with trail.optimizer.stratify(batch.index()):
                losses = forward(trail.model, batch)
            found.append(outcome(losses.mean().backward))
    assert found[0] == found[1]
    assert found[0] is not None
    assert found[0][0] is AggregationError
