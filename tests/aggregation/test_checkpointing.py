"""Activation checkpointing recomputes outside the interception: an error, no wrong gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from pinet_fast.aggregation import GradientAggregator

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


LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),  # square: shapes cannot tell
    "layer_norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh()),
    "mul": Gate,
    "matmul": Tied,
}


@pytest.mark.parametrize("layer", LAYERS)
def test_recomputation_is_refused(layer: str) -> None:
    torch.manual_seed(0)
    first, inner = nn.Linear(4, 4), LAYERS[layer]()
    opt = GradientAggregator(
        torch.optim.SGD([*first.parameters(), *inner.parameters()], lr=0.1), "agreement"
    )
    with opt.stratify(IDS):
        x = first(torch.randn(7, 4))
        losses = checkpoint(inner, x, use_reentrant=False).pow(2).sum(1)
    with pytest.raises(CheckpointError, match="different number of tensors"):
        opt.backward(losses)


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
