"""Layers that ask the lane at once, without the way through torch's stack of modes."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.lanes import (
    WARM_UP,
    Batch,
    D,
    V,
    batches,
    boundaries_in_python,
    compare,
    lane,
    per_row,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import pinet_fast
from pinet_fast.aggregation import GradientAggregator
from pinet_fast.aggregation.lane import layer_functions, refusal
from pinet_fast.models import layers

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")


class Direct(nn.Module):
    """The three layers of ``pinet_fast.models``."""

    def __init__(self) -> None:
        super().__init__()
        self.items = layers.Embedding(V, D, padding_idx=0)
        self.norm = layers.LayerNorm(D)
        self.up = layers.Linear(D, D)

    def forward(self, batch: Batch) -> Tensor:
        x = self.items(batch.ids(V, batch.num_rows))
        return x + F.gelu(self.up(self.norm(x)))


class Seen(TorchFunctionMode):
    """Counts calls of functions by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def forward(model: Direct, batch: Batch) -> Tensor:
    return per_row(model(batch))


def test_steps_are_the_same_and_pass_by_python() -> None:
    ours, theirs = compare(Direct, batches(6), forward=forward)
    assert ours.num_in_python[WARM_UP:] == [0] * 3
    assert theirs.num_in_python[-1] == 3


def test_the_mode_of_the_interception_is_not_asked() -> None:
    """That is what is won: here a mode fails at the first call that it sees."""
    torch.manual_seed(0)
    model = Direct()
    opt = GradientAggregator(torch.optim.SGD(model.named_parameters(), lr=0.1), "agreement")
    asked = 0

    def refuse(mode: Any, func: Any, *rest: Any) -> None:
        raise LookupError(func.__name__)

    with lane(True):
        for batch in batches(WARM_UP + 2):
            ids = batch.ids(V, batch.num_rows)
            with opt.stratify(batch.index()):
                assert opt._session is not None
                mode = opt._session.interception
                held = mode.__dict__.get("__torch_function__")
                if held:
                    mode.__torch_function__ = MethodType(refuse, mode)
                    with pytest.raises(LookupError, match=r"^dim$"):  # of the losses
                        per_row(model.up(model.norm(model.items(ids))))
                    mode.__torch_function__ = held
                    asked += 1
                    assert set(mode.leaves.sparse_tables) == {0}
                    assert len(mode.leaves.dense_leaves) == 4
                losses = per_row(model.up(model.norm(model.items(ids))))
            opt.backward(losses)
            opt.step()
            opt.zero_grad()
    assert asked >= 2


def test_modes_of_others_see_the_calls() -> None:
    """Outside, inside and around ``stratify``, above the interception and below it."""
    model = Direct()
    batch = batches(1)[0]
    with Seen() as seen:
        model(batch)
    assert [n for n in seen.names if n in ("linear", "layer_norm", "embedding")] == [
        "embedding", "layer_norm", "linear",
    ]  # fmt: skip
    counts = []

    def under(model: Direct, batch: Batch) -> Tensor:
        with Seen() as seen:
            out = forward(model, batch)
        counts.append(seen.names.count("linear"))
        return out

    compare(Direct, batches(5), forward=under)
    assert counts == [1] * 10
    torch.set_default_device("cpu")  # a mode, at the bottom of the stack
    try:
        compare(Direct, batches(5), forward=forward)
    finally:
        torch.set_default_device(None)


def test_checkpointed_shared_and_failed_calls() -> None:
    """Replays, work that belongs to no user, and errors leave the direct way as it was."""

    def mixed(model: Direct, batch: Batch) -> Tensor:
        x = model.items(batch.ids(V, batch.num_rows))
        h = checkpoint(lambda x: model.up(F.dropout(x, 0.5)), x, use_reentrant=False)
        with pinet_fast.shared():
            pool = model.items(torch.arange(1, 4))
        if batch.seed == WARM_UP:
            with pytest.raises((RuntimeError, ValueError)):
                model.up(x[:, :-1])
        return per_row(model.norm(x + h) @ pool.T)

    compare(Direct, batches(7), forward=mixed)


def test_other_layers_than_the_lane_knows() -> None:
    """Without bias, without scale, three dimensions, keyword-free calls of other sizes."""

    class Odd(Direct):
        def __init__(self) -> None:
            super().__init__()
            self.up = layers.Linear(D, D, bias=False)
            self.norm = layers.LayerNorm(D, elementwise_affine=False)

    compare(Odd, batches(6), forward=forward)

    def deep(model: Direct, batch: Batch) -> Tensor:
        x = model.items(batch.ids(V, batch.num_rows, 2))
        return per_row(model.up(model.norm(x)))

    compare(Direct, batches(6), forward=deep)


def test_two_aggregators_in_turn_and_nested() -> None:
    """The lane of the forward that runs is asked, not that of the one that began last."""

    def train(on: bool) -> list[Tensor]:
        torch.manual_seed(0)
        one, two = Direct(), Direct()
        first, second = (
            GradientAggregator(torch.optim.SGD(m.named_parameters(), lr=0.1), "agreement")
            for m in (one, two)
        )
        with lane(on):
            for batch in batches(6):
                first.zero_grad()
                second.zero_grad()
                with first.stratify(batch.index()):
                    half = one.items(batch.ids(V, batch.num_rows))
                    with second.stratify(batch.index()):
                        other = forward(two, batch)
                    losses = per_row(one.up(one.norm(half)))
                second.backward(other)
                first.backward(losses)
                first.step()
                second.step()
        return [p.detach().clone() for m in (one, two) for p in m.parameters()]

    for mine, theirs in zip(train(True), train(False), strict=True):
        assert torch.equal(mine, theirs)


def test_outside_stratify_they_are_torch_s_own() -> None:
    functions = layer_functions()
    x, w, b = torch.randn(3, D), torch.randn(D, D, requires_grad=True), torch.randn(D)
    with boundaries_in_python() as seen:
        assert torch.equal(functions.linear(x, w, b), F.linear(x, w, b))
        assert torch.equal(functions.linear(x, w, None), F.linear(x, w))
        assert torch.equal(
            functions.layer_norm(x, (D,), w[0], b, 1e-5), F.layer_norm(x, (D,), w[0], b)
        )
        ids = torch.tensor([1, 0])
        assert torch.equal(functions.embedding(w, ids, -1), F.embedding(ids, w))
    assert not seen
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        functions.linear(x, w[:, :2], b)
    with pytest.raises(TypeError):
        functions.linear(x)  # type: ignore[call-arg]
    assert functions.linear(x, w, b).grad_fn is not None
    with torch.no_grad():
        assert functions.linear(x, w, b).grad_fn is None
