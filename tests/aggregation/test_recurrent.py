"""Recurrent layers: every cell, depth, direction and state, against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator

IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2])
B, L, D, H, S = 7, 5, 4, 3, 3

CELLS: dict[str, Any] = {
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2, "batch_first": True},
    "both directions": {"bidirectional": True},
    "deep, both, dropout": {"num_layers": 3, "bidirectional": True, "dropout": 0.4},
    "dropout, batch first": {"num_layers": 2, "batch_first": True, "dropout": 0.4},
}


def inputs(layer: nn.RNNBase, dtype: torch.dtype, steps: int = L) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (B, steps, D) if layer.batch_first else (steps, B, D)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def losses_of(layer: nn.RNNBase, x: Tensor, states: Any = None) -> Tensor:
    """One loss a user, of all outputs and all last states."""
    torch.manual_seed(9)  # the masks between layers
    out, last = layer(x) if states is None else layer(x, states)
    users = out if layer.batch_first else out.transpose(0, 1)
    last = last if isinstance(last, tuple) else (last,)
    total = users.sin().flatten(1).sum(1)
    for i, state in enumerate(last):
        total = total + (i + 1) * state.square().sum((0, 2))
    return total


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_and_bit_identical_forward(cell: str, shape: str) -> None:
    make, options = CELLS[cell]
    torch.manual_seed(0)
    layer = make(D, H, **options, **SHAPES[shape]).double()
    x = inputs(layer, torch.float64)
    parameters = list(layer.parameters())
    plain = losses_of(layer, x)
    expected = autograd_stratum_gradients(lambda: losses_of(layer, x), IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            losses = losses_of(layer, x)
        assert torch.equal(losses, plain)
        opt.backward(losses)
        assert not opt.coverage().sliced
        # A dead unit of a ReLU may leave a pair of strata without proof.
        assert opt.report.leak == "proven" or cell == "relu"

    for got, theirs in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_rows_and_first_states_get_their_gradient(cell: str) -> None:
    """What lies below the layer, states computed from users included."""
    make, options = CELLS[cell]
    torch.manual_seed(0)
    below, start = nn.Linear(D, D).double(), nn.Linear(D, H).double()
    layer = make(D, H, **options).double()
    x = inputs(layer, torch.float64)
    parameters = [*below.parameters(), *start.parameters(), *layer.parameters()]

    def losses() -> Tensor:
        first = start(x[0]).unsqueeze(0)
        states = (first, first.tanh()) if cell == "lstm" else first
        return losses_of(layer, below(x), states)

    expected = autograd_stratum_gradients(losses, IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            values = losses()
        opt.backward(values)

    for got, theirs in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_size(data: st.DataObject) -> None:
    cell = data.draw(st.sampled_from(list(CELLS)))
    users, steps = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 6))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=users, max_size=users)))
    make, options = CELLS[cell]
    torch.manual_seed(0)
    layer = make(2, 5, batch_first=data.draw(st.booleans()), **options).double()
    shape = (users, steps, 2) if layer.batch_first else (steps, users, 2)
    x = torch.randn(shape, dtype=torch.float64)
    parameters = list(layer.parameters())
    expected = autograd_stratum_gradients(lambda: losses_of(layer, x), ids, parameters, 4)
    opt = GradientAggregator(torch.optim.SGD(parameters, lr=0.1), "agreement", num_strata=4)
    with opt.stratify(ids):
        losses = losses_of(layer, x)
    opt.backward(losses)
    assert opt.report.gram is not None
    flat = torch.cat([g.flatten(1) for g in expected], dim=1)
    torch.testing.assert_close(opt.report.gram, flat @ flat.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cell", CELLS)
def test_float32(cell: str) -> None:
    make, options = CELLS[cell]
    torch.manual_seed(0)
    layer = make(D, 16, batch_first=True, **options)
    x = inputs(layer, torch.float32, steps=30)
    parameters = list(layer.parameters())
    expected = autograd_stratum_gradients(lambda: losses_of(layer, x), IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            losses = losses_of(layer, x)
        opt.backward(losses)

    for got, theirs in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        assert float((got - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_frozen_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(D, H, batch_first=True).double()
    layer.weight_hh_l0.requires_grad_(False)
    x = inputs(layer, torch.float64)
    kept = [p for p in layer.parameters() if p.requires_grad]
    expected = autograd_stratum_gradients(lambda: losses_of(layer, x), IDS, kept, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            losses = losses_of(layer, x)
        opt.backward(losses)

    for got, theirs in zip(stratum_gradients(kept, S, run), expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-12)
    assert layer.weight_hh_l0.grad is None


@pytest.mark.parametrize("kind", ["projection", "learned first state"])
def test_what_has_no_rule_is_sliced_and_exact(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(D, 6, proj_size=3 if kind == "projection" else 0).double()
    width = 3 if kind == "projection" else 6
    first = nn.Parameter(torch.randn(1, 1, width, dtype=torch.float64))
    x = inputs(layer, torch.float64)
    parameters = [*layer.parameters()] + ([] if kind == "projection" else [first])

    def losses() -> Tensor:
        if kind == "projection":
            return losses_of(layer, x)
        start = first.expand(1, B, width).contiguous()
        return losses_of(layer, x, (start, torch.zeros(1, B, 6, dtype=torch.float64)))

    expected = autograd_stratum_gradients(losses, IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            values = losses()
        opt.backward(values)
        assert opt.coverage().sliced

    for got, theirs in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-12)
