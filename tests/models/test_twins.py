"""Ragged models against padded twins, values and gradients, on random lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import ragged_batch
from support.padded import din_by_hand, padded_gru4rec, padded_sasrec

from pinet_fast.models import DIN, GRU4Rec, SASRec
from pinet_fast.models.ragged_gru import RaggedGRU, StepPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

V = 17


def same_with_gradients(model: nn.Module, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(expected)
    parameters = [p for name, p in model.named_parameters() if "bias.weight" not in name]
    mine = torch.autograd.grad(got, parameters, weight, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, weight, allow_unused=True)
    for p, a, b in zip(parameters, mine, theirs, strict=True):
        zero = torch.zeros_like(p)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


TWINS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]] = {
    "gru4rec": (lambda: GRU4Rec(V, dim=5), padded_gru4rec),
    "gru4rec-2": (lambda: GRU4Rec(V, dim=4, num_layers=2), padded_gru4rec),
    "sasrec": (lambda: SASRec(V, max_len=20, dim=8, num_heads=2), padded_sasrec),
    "sasrec-post": (lambda: SASRec(V, max_len=20, dim=8, num_heads=2, norm="post"), padded_sasrec),
}


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_states_equal_those_of_the_padded_twin(name: str, lengths: list[int], seed: int) -> None:
    make, twin = TWINS[name]
    torch.manual_seed(seed)
    model = make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    batch = ragged_batch([0] * len(lengths), lengths, num_strata=1, num_items=V, seed=seed)
    got = model.hidden(batch.values, batch.offsets)
    same_with_gradients(model, got, twin(model, batch.values, batch.offsets))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    candidates=st.integers(1, 3),
    per_user=st.booleans(),
    pooling=st.sampled_from(["attention", "mean"]),
)
def test_din_is_the_formula_pair_by_pair(
    lengths: list[int], candidates: int, per_user: bool, pooling: str
) -> None:
    torch.manual_seed(len(lengths))
    table = torch.randint(0, 4, (V + 1, 2))
    table[0] = 0
    table[1, 0] = 3
    model = DIN(V, dim=3, unit=4, layers=(5, 3), categories=table, pooling=pooling)  # type: ignore[arg-type]
    model = model.double().eval()
    batch = ragged_batch([0] * len(lengths), lengths, num_strata=1, num_items=V)
    rows = len(lengths) if per_user else sum(lengths)
    items = torch.randint(1, V + 1, (rows, candidates))
    got = model.states(batch, items, per_user=per_user)
    expected = din_by_hand(model, batch, items, per_user=per_user)
    torch.testing.assert_close(got, expected)
    if rows:
        same_with_gradients(model, got, expected)


def test_gru_keeps_the_order_of_rows_and_their_gradients() -> None:
    """A gradient for one user's events reaches that user's input rows only."""
    torch.manual_seed(0)
    layer = RaggedGRU(3, 4).double()
    offsets = torch.tensor([0, 2, 2, 7, 8])
    rows = torch.randn(8, 3, dtype=torch.float64).t().contiguous().t().requires_grad_()
    assert not rows.is_contiguous()
    out = layer(rows, StepPlan(offsets))
    (grad,) = torch.autograd.grad(out[2:7].sum(), rows)
    assert (grad[2:7] != 0).all()
    assert torch.equal(grad[:2], torch.zeros(2, 3).double())
    assert torch.equal(grad[7:], torch.zeros(1, 3).double())
    assert layer(rows[:0], StepPlan(torch.tensor([0, 0]))).shape == (0, 4)
