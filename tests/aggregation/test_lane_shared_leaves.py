"""Parameters that Python and the lane both use: leaves, the count of uses, and older graphs."""

from __future__ import annotations

import gc
import os
import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast import _env
from pinet_fast.aggregation import GradientAggregator, stratifying
from pinet_fast.aggregation.lane import refusal
from pinet_fast.errors import AggregationError, StratumLeakError

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")

D, SETTLED = 4, 4
LANES = pytest.mark.parametrize("lane", ["0", "1"])


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stratifying, "is_compiler_used", lambda: False)


def aggregator(*modules: nn.Module, num_strata: int = 2) -> GradientAggregator:
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=0.1)
    return GradientAggregator(sgd, "agreement", num_strata=num_strata)


@LANES
def test_uses_inside_an_opened_layer_count(monkeypatch: pytest.MonkeyPatch, lane: str) -> None:
    """Attention is opened in Python and its last layer is the lane's: a further use needs proof."""
    monkeypatch.setenv(_env.LANE, lane)
    torch.manual_seed(0)
    ids, size = torch.arange(8) // 4, 8
    attention = nn.MultiheadAttention(size, 2)
    attention.in_proj_weight.requires_grad_(False)
    attention.in_proj_bias.requires_grad_(False)
    mask = torch.full((size, size), -torch.inf)
    mask[:4, :4] = mask[4:, 4:] = 0
    opt = aggregator(attention)
    for step in range(SETTLED + 3):
        x, y = torch.randn(2, size, size)
        opt.zero_grad()
        with opt.stratify(ids):
            h, _ = attention(x, x, x, attn_mask=mask, need_weights=False)
            losses = h.square().sum(1)
            if step >= SETTLED:  # behind it users mix
                mixed = attention.out_proj(y).mean(0, keepdim=True).expand(size, size)
                losses = losses + mixed.square().sum(1)
        if step < SETTLED:
            opt.backward(losses)
            opt.step()
        else:
            with pytest.raises(StratumLeakError):
                opt.backward(losses)
    assert "use 2: unproven" in str(opt.coverage())


class Both(nn.Module):
    """One layer's uses in Python and in the lane, and another layer that Python used first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return losses, and a state that the lane had no part in."""
        rows, deep = torch.randn(6, D), torch.randn(6, 3, D)
        before = self.first(deep).mean(1)
        flat = self.up(rows)
        state = self.up(deep).mean(1)
        return (before + flat + state).square().sum(1), state


IDS = torch.tensor([0, 0, 0, 1, 1, 1])


def with_older_state() -> tuple[Both, GradientAggregator, Tensor]:
    """Return a settled model and a state of a forward that had no backward."""
    torch.manual_seed(0)
    model = Both()
    opt = aggregator(model)
    for _ in range(SETTLED):
        opt.zero_grad()
        with opt.stratify(IDS):
            losses, _ = model()
        opt.backward(losses)
        opt.step()
    opt.zero_grad()
    with opt.stratify(IDS):
        _, state = model()
    opt.zero_grad()
    return model, opt, state


def test_an_older_graph_gives_a_later_forward_nothing() -> None:
    """Without the lane its gradient is dropped; with it the backward is refused."""
    norms = []
    for lane in ("0", "1"):
        with patch.dict(os.environ, {_env.LANE: lane}):
            model, opt, state = with_older_state()
            with opt.stratify(IDS):
                losses, _ = model()
            if lane == "1":
                with pytest.raises(AggregationError, match="inside stratify"):
                    state.sum().backward()
            opt.backward(losses)
            norms.append([p.grad.clone() for p in model.parameters()])
    for mine, theirs in zip(*norms, strict=True):
        assert torch.equal(mine, theirs)
    with patch.dict(os.environ, {_env.LANE: "1"}):
        model, opt, state = with_older_state()
        with opt.stratify(IDS):
            losses, _ = model()
            losses = losses + state.sum(1)
        with pytest.raises(AggregationError, match="inside stratify"):
            opt.backward(losses)
        assert all(p.grad is None for p in model.parameters())


@LANES
def test_nothing_is_kept_where_a_gradient_is_derived(
    monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    """Python collects then, and leaves that live on lose their gradients all the same."""
    monkeypatch.setenv(_env.LANE, lane)
    first, last = nn.Linear(50, 51), nn.Linear(51, 51)
    opt = aggregator(first, last, num_strata=4)
    for _ in range(SETTLED + 1):
        opt.zero_grad()
        with opt.stratify([0, 1, 2, 3]):
            losses = F.linear(first(torch.randn(4, 50)), last.weight * 2).square().sum(1)
        opt.backward(losses)
        opt.step()
    del losses
    opt.zero_grad()
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held: list[Any] = [
            x for x in gc.get_objects()
            if type(x) is Tensor and x.is_leaf and x.shape == (4, 51, 50) and x.grad is not None
        ]  # fmt: skip
    assert not held
