"""Per-sample gradients by Opacus and by torch.func, summed by stratum, beside our one pass.

The model is a padded SASRec of layers that Opacus knows; all users of a stratum count alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast import GradientAggregator
from pinet_fast.rules import Balanced

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_ITEMS, DIM, USERS, LENGTH = 3416, 64, 128, 50


def padded_sasrec() -> nn.Module:
    layers = pytest.importorskip("opacus.layers", reason="Opacus is not installed")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
            self.attention = layers.DPMultiheadAttention(DIM, 1, batch_first=True)
            self.wide, self.narrow = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.narrow(F.relu(self.wide(self.second(x))))

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(NUM_ITEMS + 1, DIM)
            self.positions = nn.Embedding(LENGTH, DIM)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
            places = torch.arange(LENGTH).expand_as(items)
            x = self.items(items) + self.positions(places)
            for block in self.blocks:
                x = block(x)
            good = (x * self.items(targets)).sum(-1)
            bad = (x * self.items(negatives)).sum(-1)
            return (F.softplus(-good) + F.softplus(bad)).mean(1)

    torch.manual_seed(0)
    return Padded()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(1, NUM_ITEMS + 1, (3, USERS, LENGTH), generator=generator)
    return items[0], items[1], items[2]


def by_opacus(strata: Tensor, num_strata: int) -> tuple[nn.Module, Callable[[], None]]:
    opacus = pytest.importorskip("opacus.grad_sample", reason="Opacus is not installed")
    model = padded_sasrec()
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    parameters = list(model.parameters())
    opt = torch.optim.Adam(parameters)
    counts = torch.bincount(strata, minlength=num_strata).float()
    data = batch()

    def step() -> None:
        opt.zero_grad()
        wrapped.zero_grad()
        wrapped(*data).sum().backward()
        stacked = []
        for p in parameters:
            samples = p.grad_sample
            sums = samples.new_zeros(num_strata, *p.shape).index_add_(0, strata, samples)
            stacked.append(sums / counts.view(-1, *[1] * p.dim()))
            p.grad_sample = None
        follow(parameters, stacked)
        opt.step()

    return model, step


def by_torch_func(strata: Tensor, num_strata: int) -> tuple[nn.Module, Callable[[], None]]:
    """vmap(grad(...)) over users, as the per-sample gradients of torch.func are written."""
    model = padded_sasrec()
    parameters = dict(model.named_parameters())
    opt = torch.optim.Adam(parameters.values())
    counts = torch.bincount(strata, minlength=num_strata).float()
    data = batch()

    def loss(values: dict[str, Tensor], *user: Tensor) -> Tensor:
        one = tuple(part.unsqueeze(0) for part in user)
        return torch.func.functional_call(model, values, one)[0]

    samples_of = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))

    def step() -> None:
        detached = {name: p.detach() for name, p in parameters.items()}
        stacked = [
            g.new_zeros(num_strata, *g.shape[1:]).index_add_(0, strata, g)
            / counts.view(-1, *[1] * (g.dim() - 1))
            for g in samples_of(detached, *data).values()
        ]
        follow(list(parameters.values()), stacked)
        opt.step()

    return model, step


def follow(parameters: list[Tensor], stacked: list[Tensor]) -> None:
    """Leave the combination of S gradients in every ``p.grad``."""
    flat = [g.flatten(1) for g in stacked]
    weights = Balanced().weights(torch.stack([g @ g.T for g in flat]).sum(0).double()).float()
    for p, g in zip(parameters, stacked, strict=True):
        p.grad = torch.einsum("s,s...->...", weights, g)


def by_one_pass(strata: Tensor, num_strata: int) -> tuple[nn.Module, Callable[[], None]]:
    model = padded_sasrec()
    opt = GradientAggregator(
        torch.optim.Adam(model.parameters()), "balanced", num_strata=num_strata
    )
    data = batch()

    def step() -> None:
        opt.zero_grad()
        with opt.stratify(strata):
            losses = model(*data)
        opt.backward(losses)
        opt.step()

    return model, step


WAYS = {"one pass": by_one_pass, "Opacus per-sample": by_opacus,
        "torch.func per-sample": by_torch_func}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Opacus hooks warn on every layer whose input is no leaf
@pytest.mark.parametrize("num_strata", [4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_step_of(way: str, num_strata: int, paired: Callable[..., Any], benchmark: Any) -> None:
    benchmark.group = "peers"
    strata = torch.arange(USERS) * num_strata // USERS
    rounds = 12 if way == "one pass" else 6
    gradients = []
    other = by_torch_func if way == "one pass" else by_one_pass
    for make in (other, WAYS[way]):  # nobody is timed on a wrong gradient
        model, step = make(strata, num_strata)
        step()
        gradients.append([p.grad for p in model.parameters()])
    scale = max(float(g.abs().max()) for g in gradients[0] if g is not None)
    for mine, theirs in zip(*gradients, strict=True):
        assert mine is not None
        assert theirs is not None
        assert float((mine - theirs).abs().max()) <= 1e-4 * scale
    _, candidate = WAYS[way](strata, num_strata)
    plain_model = padded_sasrec()
    plain_opt = torch.optim.Adam(plain_model.parameters())
    data = batch()

    def plain() -> None:
        plain_opt.zero_grad()
        plain_model(*data).mean().backward()
        plain_opt.step()

    assert paired(candidate, plain, rounds=rounds).ratio > 0
