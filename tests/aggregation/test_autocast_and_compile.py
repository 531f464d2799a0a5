"""Autocast, and models that are compiled."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator

IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2])
B, H, D, S = 7, 3, 4, 3


class Mixed(nn.Module):
    """Everything autocast treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.tied = nn.Parameter(torch.randn(5, 8))

    def forward(self, items: Tensor) -> Tensor:
        hidden = self.norm(self.first(self.table(items)).relu()) * self.scale
        return F.cross_entropy(hidden @ self.tied.T, items % 5, reduction="none")


def test_autocast_is_as_exact_as_autocast() -> None:
    """The forward is bit-identical; gradients differ by the rounding of bf16 products.

    A product over n rows in bf16 rounds its result to 8 bits: 2^-8 of the largest entry, for each
    of the two products between a weight's gradient and the loss.
    """
    torch.manual_seed(0)
    model = Mixed()
    items = torch.randint(9, (B,))
    parameters = list(model.parameters())

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(items)

    expected = autograd_stratum_gradients(losses, IDS, parameters, S)
    plain = losses()

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            values = losses()
        assert torch.equal(values, plain)
        opt.backward(values)
        assert opt.report.leak == "proven"

    for got, theirs in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        assert got.dtype == torch.float32
        error = float((got - theirs).abs().max() / theirs.abs().max())
        assert error <= 2 * 2**-8


def test_compiled_models_run_and_are_exact() -> None:
    """Inside stratify they run eagerly: a compiled graph would hide its boundaries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(B, D, dtype=torch.float64)
    compiled(x).sum().backward()  # compiled before the context
    grams = []
    for net, of in ((compiled, model), (twin, twin)):
        opt = GradientAggregator(torch.optim.SGD(of.parameters(), lr=0.1), "agreement")
        opt.zero_grad()
        with opt.stratify(IDS):
            losses = net(x).square().squeeze(1)
        opt.backward(losses)
        grams.append(opt.report.gram)
        opt.step()
    assert torch.equal(grams[0], grams[1])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
