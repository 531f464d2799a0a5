"""The compiled lane beside other machinery of torch: it takes part, or Python does."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.lanes import (
    WARM_UP,
    Batch,
    D,
    Small,
    V,
    batches,
    compare,
    lane,
    outcome,
    per_row,
    train,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pinet_fast
from pinet_fast.aggregation.lane import refusal
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")


def small(model: Small, batch: Batch) -> Tensor:
    return per_row(model(batch))


class Tagged(Tensor):
    """A subclass; its functions are those of tensors, and return it again."""


def test_a_subclass_of_tensor_stays_one() -> None:
    kinds = []

    def forward(model: Small, batch: Batch) -> Tensor:
        ids = batch.ids(V, batch.num_rows).as_subclass(Tagged)
        x = model.items(ids)
        h = model.up(model.norm(x))
        kinds.append((type(x), type(h)))
        return per_row(h.as_subclass(Tensor))

    ours, _ = compare(Small, batches(5), forward=forward)
    assert set(kinds) == {(Tagged, Tagged)}
    assert ours.num_in_python == [3] * 5


class Watching(TorchFunctionMode):
    """Counts calls, and makes what linear layers return visibly its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.seen[func.__name__] += 1
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is F.linear else out


def test_another_mode_around_the_steps_sees_every_call() -> None:
    seen = []
    for on in (True, False):
        with Watching() as mode:
            trail = train(Small, batches(5), on=on, forward=small)
        counts = {op: mode.seen[op] for op in ("linear", "native_layer_norm", "embedding", "gelu")}
        seen.append((counts, trail.entries))
    assert seen[0] == seen[1]
    assert counts["linear"] == 5


def test_another_mode_inside_the_forward() -> None:
    """It is asked first, and what it passes on comes to the lane."""
    seen = []

    def forward(model: Small, batch: Batch) -> Tensor:
        with Watching() as mode:
            losses = small(model, batch)
        seen.append(dict(mode.seen))
        return losses

    ours, _ = compare(Small, batches(5), forward=forward)
    assert ours.num_in_python[WARM_UP:] == [0, 0]
    assert seen[:5] == seen[5:]


def test_a_default_device() -> None:
    """It is a mode too."""
    try:
        torch.set_default_device("cpu")
        compare(Small, batches(5), forward=small)
    finally:
        torch.set_default_device(None)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.attention = nn.MultiheadAttention(D, 2)
        self.last = nn.Linear(D, D)


def test_attention_enters_the_mode_again() -> None:
    """What the lane noted before is still known after: sizes alone do not tell where L == B."""

    def forward(model: Attending, batch: Batch) -> Tensor:
        h = model.first(batch.numbers(batch.num_users, D))
        over_time = h.unsqueeze(0).expand(5, -1, -1)
        h = h + model.attention(over_time, over_time, over_time)[0].mean(0)
        length = batch.num_users + (batch.seed < WARM_UP)
        wide = model.last(h.unsqueeze(0).expand(length, -1, -1))
        return per_row(wide.mean(0) + model.last(h))

    ours, theirs = compare(Attending, batches(6, ragged=False), forward=forward)
    assert ours.num_in_python[-1] < theirs.num_in_python[-1]


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_every_operator() -> None:
    seen = []

    def forward(model: Small, batch: Batch) -> Tensor:
        with Operators() as mode:
            losses = small(model, batch)
        seen.append({op: mode.seen[f"aten.{op}.default"] for op in ("addmm", "native_layer_norm")})
        return losses

    ours, _ = compare(Small, batches(5), forward=forward)
    assert seen == [{"addmm": 1, "native_layer_norm": 1}] * 10
    assert ours.num_in_python == [3] * 5


def test_a_dispatch_mode_around_the_backward() -> None:
    seen = []
    for on in (True, False):
        trail = train(Small, batches(4), on=on, forward=small)
        with lane(on), trail.optimizer.stratify(batches(4)[-1].index()):
            losses = small(trail.model, batches(4)[-1])
        with Operators() as mode:
            trail.optimizer.backward(losses)
        seen.append(sum(n for op, n in mode.seen.items() if "stratified_norm_backward" in op))
    assert seen == [1, 1]


@pytest.mark.parametrize("is_all", [True, False])
def test_autocast(is_all: bool) -> None:
    """What is inside goes to Python; what is outside does not."""

    def forward(model: Small, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_all):
            x = model.items(batch.ids(V, batch.num_rows))
            h = model.norm(x)
        with torch.autocast("cpu", torch.bfloat16):
            return per_row(x + model.up(h).float())

    ours, _ = compare(Small, batches(6), forward=forward)
    assert ours.num_in_python[WARM_UP:] == [3 if is_all else 1] * 3


def test_parts_without_gradient() -> None:
    def forward(model: Small, batch: Batch) -> Tensor:
        x = model.items(batch.ids(V, batch.num_rows))
        with torch.no_grad():
            y = model.above(x)
            assert y.grad_fn is None
        with torch.inference_mode():
            assert model.above(x).grad_fn is None
        return per_row(model.up(x) + y)

    ours, _ = compare(Small, batches(5), forward=forward)
    assert ours.num_in_python[WARM_UP:] == [0, 0]


def test_shared_work_is_left_to_python_and_what_follows_is_not() -> None:
    def forward(model: Small, batch: Batch) -> Tensor:
        with pinet_fast.shared():
            pool = model.above(model.items(batch.ids(V, 9)))
        x = model(batch)
        return per_row(x + (x @ pool.t()).softmax(1) @ pool)

    ours, theirs = compare(Small, batches(6), forward=forward)
    # Both products with the pool, in which no parameter itself takes part, and its transpose.
    assert ours.num_in_python[-1] == theirs.num_in_python[-1] - 3
    assert ours.in_python[-1]["linear"] == 0


def test_an_error_inside_shared_work_does_not_turn_the_lane_off() -> None:
    def forward(model: Small, batch: Batch) -> Tensor:
        if batch.seed == WARM_UP:
            with pinet_fast.shared():
                raise ValueError("no")
        return small(model, batch)

    ours, _ = compare(Small, batches(6), forward=forward, catches=ValueError)
    assert ours.entries[WARM_UP]["error"] == (ValueError, "no")
    assert ours.num_in_python[WARM_UP + 1 :] == [0, 0]


def test_checkpointed_parts() -> None:
    def forward(model: Small, batch: Batch) -> Tensor:
        x = model.items(batch.ids(V, batch.num_rows))
        h = checkpoint(lambda x: model.up(F.dropout(x, 0.5)), x, use_reentrant=False)
        return per_row(model.norm(x + h))

    ours, theirs = compare(Small, batches(6), forward=forward)
    assert ours.num_in_python[-1] == theirs.num_in_python[-1] - 2


def test_replays_know_the_rows_that_the_lane_noted() -> None:
    """As many positions as users: in the backward too only the graph tells which are the rows."""

    class Placed(Small):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Parameter(torch.randn(3, D))

    def forward(model: Placed, batch: Batch) -> Tensor:
        x = batch.numbers(batch.num_users, 3, D) + model.place
        if batch.seed < WARM_UP:
            return per_row(x)
        h = checkpoint(lambda x: model.up(F.dropout(x, 0.5)), x, use_reentrant=False)
        return per_row(x + h)

    steps = [Batch([2, 0, 1, 1], seed=i) for i in range(WARM_UP)]
    steps += [Batch([2, 0, 1], seed=WARM_UP + i) for i in range(3)]
    ours, theirs = compare(Placed, steps, forward=forward)
    assert ours.num_in_python[-1] == theirs.num_in_python[-1] - 1


def test_reentrant_checkpoints_are_refused_alike() -> None:
    def forward(model: Small, batch: Batch) -> Tensor:
        x = model.items(batch.ids(V, batch.num_rows))
        if batch.seed < WARM_UP:
            return per_row(model.above(x))
        return per_row(x + checkpoint(model.above, x, use_reentrant=True))

    ours, _ = compare(Small, batches(5), forward=forward, catches=AggregationError)
    assert "error" in ours.entries[-1]


def test_a_gradient_inside_the_forward_of_checkpointed_parts() -> None:
    """It recomputes in replay; the lane goes on after it."""

    def forward(model: Small, batch: Batch) -> Tensor:
        x = model.items(batch.ids(V, batch.num_rows))
        h = checkpoint(lambda x: torch.tanh(model.up(x)), x, use_reentrant=False)
        losses = per_row(model.norm(x + h))
        (pull,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
        return losses + per_row(model.norm(x + pull))

    ours, theirs = compare(Small, batches(6), forward=forward)
    assert ours.num_in_python[-1] == theirs.num_in_python[-1] - 3


def test_saved_tensors_that_go_to_hooks() -> None:
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor

    def forward(model: Small, batch: Batch) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return small(model, batch)

    ours, theirs = compare(Small, batches(5), forward=forward)
    assert packed[: len(packed) // 2] == packed[len(packed) // 2 :]
    assert ours.num_in_python == theirs.num_in_python


def test_vmap_is_refused() -> None:
    found = []
    for on in (True, False):
        trail = train(Small, batches(4), on=on, forward=small)
        batch = batches(4)[-1]

        def run(trail: Any = trail, batch: Batch = batch) -> None:
            with trail.optimizer.stratify(batch.index()):
                x = batch.numbers(2, batch.num_rows, D)
                torch.func.vmap(trail.model.above)(x)

        with lane(on):
            found.append(outcome(run))
    assert found[0] == found[1]
    assert found[0] is not None
    assert "torch.func transforms" in found[0][1]


def test_hooks_on_what_the_lane_returns() -> None:
    seen = []

    def forward(model: Small, batch: Batch) -> Tensor:
        x = model.items(batch.ids(V, batch.num_rows))
        h = model.up(model.norm(x))
        h.retain_grad()
        h.register_hook(lambda grad: grad * 2)
        assert h.grad_fn is not None
        h.grad_fn.register_hook(lambda grads, _: seen.append(len(grads)))
        return per_row(h.relu_() + x)

    compare(Small, batches(5), forward=forward)
    assert len(seen) >= 10
