"""What the contract tests share: a small model, a batch, and its stratum gradients."""

from __future__ import annotations

from typing import Any

import torch
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast import GradientAggregator

IDS = torch.tensor([0, 1, 1, 2, 0, 1, 1])
X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
S = 3


def network(seed: int = 0) -> nn.Sequential:
    """A model with parameters 0.weight, 0.bias, 2.weight, 2.bias."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def losses_of(model: nn.Module, x: Tensor = X) -> Tensor:
    """One loss a user."""
    return model(x).pow(2).sum(1)


def run_step(opt: GradientAggregator, model: nn.Module, ids: Tensor = IDS, x: Tensor = X) -> None:
    """zero_grad, forward, backward, step, as in the README."""
    opt.zero_grad()
    with opt.stratify(ids, num_strata=S):
        losses = losses_of(model, x)
    opt.backward(losses)
    opt.step()


def stratum_gradients(model: nn.Module, ids: Tensor = IDS, x: Tensor = X) -> list[Tensor]:
    """Return [S, *shape] for each parameter, by plain autograd."""
    return autograd_stratum_gradients(lambda: losses_of(model, x), ids, list(model.parameters()), S)


def one_hot(index: int) -> list[float]:
    """A prior with all weight on one stratum."""
    return [float(s == index) for s in range(S)]


def assert_still_usable(opt: GradientAggregator, model: nn.Module) -> None:
    """After an error: the next step is exact, outside ``stratify`` nothing is intercepted."""
    opt.zero_grad()
    expected = stratum_gradients(model)
    with opt.stratify(IDS, num_strata=S):
        losses = losses_of(model)
    opt.backward(losses)
    weights = opt.report.weights
    assert weights is not None
    for i, (p, g) in enumerate(zip(model.parameters(), expected, strict=True)):
        row = weights[i] if weights.ndim == 2 else weights
        mix = torch.einsum("s,s...->...", row, g)
        torch.testing.assert_close(p.grad, mix, rtol=1e-10, atol=1e-14)
    opt.zero_grad()
    assert type(model(X).grad_fn).__name__ == "AddmmBackward0"


def assert_same_tree(got: object, want: object) -> None:
    """Equal containers of equal tensors and numbers."""
    if isinstance(want, dict):
        assert isinstance(got, dict)
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert_same_tree(got[key], value)
    elif isinstance(want, (list, tuple)):
        assert isinstance(got, (list, tuple))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same_tree(a, b)
    elif isinstance(want, Tensor):
        assert isinstance(got, Tensor)
        assert torch.equal(got, want)
    else:
        assert got == want


def aggregator(
    model: nn.Module, rule: Any = "agreement", every: int | None = 1, **options: Any
) -> GradientAggregator:
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
    return GradientAggregator(sgd, rule, num_strata=S, report_every=every, **options)


def assert_gradients(model: nn.Module, expected: list[Tensor]) -> None:
    for (name, p), want in zip(model.named_parameters(), expected, strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-13, msg=name)
