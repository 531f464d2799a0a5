"""Activation checkpointing: recomputed parts are intercepted again, and exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = torch.tensor([0, 1, 1, 2, 0, 1, 2])


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.table.T)


class Of(nn.Module):
    """One function of rows and parameters."""

    def __init__(self, call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.call = call
        self.weights = nn.ParameterList([torch.rand(shape) + 0.5 for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.call(x, *self.weights))


LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),  # square: shapes cannot tell
    "layer_norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh()),
    "mul": Gate,
    "matmul": Tied,
    "div": lambda: Of(torch.div, (4,)),
    "group_norm": lambda: Of(lambda x, w, b: F.group_norm(x, 2, w, b), (4,), (4,)),
    "conv1d": lambda: Of(
        lambda x, w, b: F.conv1d(x[:, None], w, b, padding=1).squeeze(1), (1, 1, 3), (1,)
    ),
    "bilinear": lambda: Of(lambda x, w, b: F.bilinear(x, x.sin(), w, b), (4, 4, 4), (4,)),
    "einsum": lambda: Of(lambda x, w: torch.einsum("bd,ed->be", x, w), (4, 4)),
    "einsum (batched)": lambda: Of(lambda x, w: torch.einsum("bd,d->bd", x, w), (4,)),
    "bmm": lambda: Of(lambda x, w: torch.bmm(x[None], w)[0], (1, 4, 4)),
}


def strata_gram(
    first: nn.Module, inner: nn.Module, recompute: bool, check: str = "first"
) -> tuple[Tensor, list[Tensor]]:
    parameters = [*first.parameters(), *inner.parameters()]
    opt = GradientAggregator(torch.optim.SGD(parameters, lr=0.1), "agreement", check=check)
    opt.zero_grad()
    torch.manual_seed(1)
    with opt.stratify(IDS):
        x = first(torch.ones(7, 4) * torch.arange(7).unsqueeze(1))
        x = checkpoint(inner, x, use_reentrant=False) if recompute else inner(x)
    opt.backward(x.pow(2).sum(1))
    assert opt.report.gram is not None
    return opt.report.gram, [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("layer", LAYERS)
def test_recomputation_is_exact(layer: str, check: str) -> None:
    torch.manual_seed(0)
    first, inner = nn.Linear(4, 4), LAYERS[layer]()
    gram, gradients = strata_gram(first, inner, recompute=True, check=check)
    expected_gram, expected = strata_gram(first, inner, recompute=False, check=check)
    assert torch.equal(gram, expected_gram)
    assert len(gradients) == len(expected) == len([*first.parameters(), *inner.parameters()])
    assert all(map(torch.equal, gradients, expected))


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    model, inner = nn.Linear(4, 4), nn.Linear(4, 4)
    opt = GradientAggregator(
        torch.optim.SGD([*model.parameters(), *inner.parameters()], lr=0.1), "agreement"
    )
    with opt.stratify(IDS):
        hidden = checkpoint(inner, model(torch.randn(7, 4)), use_reentrant=True)
    with pytest.raises(AggregationError, match="reentrant"):
        opt.backward(hidden.pow(2).sum(1))
    assert all(p.grad is None for p in [*model.parameters(), *inner.parameters()])


def test_both_kinds_in_one_model_are_refused() -> None:
    """Recomputed boundaries that get a gradient belong to the reentrant kind."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    opt = GradientAggregator(
        torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1), "agreement"
    )
    with opt.stratify(IDS):
        x = checkpoint(first, torch.randn(7, 4), use_reentrant=False)
        x = checkpoint(second, x, use_reentrant=True)
    with pytest.raises(AggregationError, match="use_reentrant=False"):
        opt.backward(x.pow(2).sum(1))


def test_a_scalar_backward_inside_the_context_recomputes_in_it() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    opt = GradientAggregator(torch.optim.SGD(inner.parameters(), lr=0.1), "agreement")
    x = torch.randn(7, 4)
    with opt.stratify(IDS):
        losses = inner(x).pow(2).sum(1)
    opt.backward(losses)
    expected = [p.grad for p in inner.parameters()]
    opt.zero_grad()
    with opt.stratify(IDS, reduction="mean"):
        checkpoint(inner, x, use_reentrant=False).pow(2).sum(1).mean().backward()
    for p, before in zip(inner.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, before)


@pytest.mark.parametrize("below", [False, True], ids=["rows are data", "rows need a gradient"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_scalar_backward_outside_the_context_raises(layer: str, below: bool) -> None:
    """The interception is gone: an error of torch, no wrong gradient."""
    torch.manual_seed(0)
    inner = LAYERS[layer]()
    opt = GradientAggregator(torch.optim.SGD(inner.parameters(), lr=0.1), "agreement")
    x = torch.randn(7, 4, requires_grad=below)
    with opt.stratify(IDS, reduction="mean"):
        losses = checkpoint(inner, x, use_reentrant=False).pow(2).sum(1)
    with pytest.raises(CheckpointError, match="different number of tensors"):
        losses.mean().backward()


def test_constant_rules_take_checkpointing() -> None:
    """No stratum gradients, no interception: the reweighted loss is an ordinary one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(7, 4)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "backdoor")
    gradients = []
    for recompute in (True, False):
        opt.zero_grad()
        with opt.stratify(IDS):
            out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
            losses = out.pow(2).sum(1)
        opt.backward(losses)
        assert model[0].weight.grad is not None
        gradients.append(model[0].weight.grad.clone())
    assert torch.equal(*gradients)
