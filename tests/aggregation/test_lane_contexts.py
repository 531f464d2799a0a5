"""The compiled lane beside other machinery of torch: it takes part, or leaves the call to Python."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.lanes import WARM_UP, Batch, batches, compare, per_row, train
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pinet_fast.aggregation.lane import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")

V, D = 20, 6


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(V, D)
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, D)

    def forward(self, batch: Batch) -> Tensor:
        x = self.items(batch.ids(V, batch.num_rows))
        return x + F.gelu(self.up(self.norm(x)))


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
