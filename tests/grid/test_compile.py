"""torch.compile of the model, and activation checkpointing, as loops use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grid.contract import S
from pinet_fast import GradientAggregator

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch"
)
LENGTH, ITEMS = 5, 11


class Tied(nn.Module):
    """Padded ids [B, L] to one loss a user, scored against the whole table."""

    def __init__(self, spelling: str = ".T") -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, 4, padding_idx=0)
        self.mix = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)
        self.spelling = spelling

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.mix(self.items(ids))))
        weight = self.items.weight
        if self.spelling == "F.linear":
            logits = nn.functional.linear(hidden, weight)
        else:
            logits = hidden @ (weight.T if self.spelling == ".T" else weight.t())
        return logits.logsumexp(-1).sum(1)


class Pick:
    """A rule that puts all weight on one stratum."""

    index = 0

    def __call__(self, gram: Tensor) -> Tensor:
        weights = torch.zeros(len(gram), dtype=gram.dtype)
        weights[self.index] = 1.0
        return weights


class Graphs:
    """Counts what Dynamo hands to the backend."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.count += 1
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, example_inputs)


def test_constant_rules_run_the_compiled_graph() -> None:
    """They need no stratum gradients: the reweighted loss of the compiled model, compiled once."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, backend = Tied().double(), Graphs()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.05), "backdoor", num_strata=S)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for i in range(6):
        strata = torch.arange(6 + i) % S
        opt.zero_grad()
        with opt.stratify(strata):
            losses = compiled(torch.randint(0, ITEMS, (6 + i, LENGTH)))
        opt.backward(losses)
        opt.step()
    assert 1 <= backend.count <= 2
    torch._dynamo.reset()


def test_the_compiled_model_still_runs_plainly() -> None:
    """Evaluation outside ``stratify`` between steps neither breaks nor is intercepted."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Tied().double()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.05), "mgda", num_strata=S)
    ids, strata = torch.randint(0, ITEMS, (6, LENGTH)), torch.tensor([0, 1, 2, 2, 1, 0])
    for _ in range(3):
        opt.zero_grad()
        with opt.stratify(strata):
            losses = compiled(ids)
        opt.backward(losses)
        opt.step()
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


class Blocks(nn.Module):
    """Two checkpointed blocks, the second within a checkpoint of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.4))
        self.second = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        self.recompute = False

    def tail(self, x: Tensor) -> Tensor:
        return torch.tanh(self.run(self.second, x))

    def run(self, module: Any, x: Tensor) -> Tensor:
        if not self.recompute:
            return module(x)  # type: ignore[no-any-return]
        return checkpoint(module, x, use_reentrant=False)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.tail, self.run(self.first, x)).pow(2).sum(1)


@pytest.mark.parametrize("how", ["opt.backward", "loss.backward inside"])
def test_nested_checkpoints_with_dropout_are_exact(how: str) -> None:
    torch.manual_seed(0)
    model, rule = Blocks().double(), Pick()
    x, strata = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])

    def losses() -> Tensor:
        torch.manual_seed(3)
        return model(x)  # type: ignore[no-any-return]

    expected = autograd_stratum_gradients(losses, strata, [*model.parameters()], S)
    model.recompute = True
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.05), rule, num_strata=S)
    options = {} if how == "opt.backward" else {"reduction": "mean"}
    for s in range(S):
        rule.index = s
        opt.zero_grad()
        with opt.stratify(strata, **options):
            values = losses()
            if how == "loss.backward inside":
                values.mean().backward()
        if how == "opt.backward":
            opt.backward(values)
        for p, want in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, want[s], rtol=1e-10, atol=1e-13)


def test_exact_mode_of_a_compiled_model() -> None:
    """S backwards through one graph: a compiled backward refuses that unless it is prepared."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, rule = Tied().double(), Pick()
    ids, strata = torch.randint(0, ITEMS, (6, LENGTH)), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = autograd_stratum_gradients(lambda: model(ids), strata, [*model.parameters()], S)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    opt = GradientAggregator(
        torch.optim.SGD(model.parameters(), lr=0.05), rule, num_strata=S, mode="exact"
    )
    for s in range(S):
        rule.index = s
        opt.zero_grad()
        with opt.stratify(strata):
            losses = compiled(ids)
        opt.backward(losses)
        for p, want in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, want[s], rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
