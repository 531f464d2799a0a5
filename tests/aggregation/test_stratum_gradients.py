"""One backward gives the gradients of S separate autograd passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import ragged_batch
from support.oracle import TOL, autograd_stratum_gradients, relative_error
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator, StrataIndex
from pinet_fast.aggregation.losses import stratum_losses
from pinet_fast.models import SASRec

if TYPE_CHECKING:
    from collections.abc import Callable


def one_pass(model: nn.Module, losses: Callable[[], Tensor], strata: StrataIndex) -> list[Tensor]:
    """Return the library's stratum gradients, in full, one [S, *shape] a parameter."""
    optimizer = GradientAggregator(torch.optim.SGD(model.named_parameters(), lr=0.1), "agreement")
    with optimizer.stratify(strata):
        values = losses()
    session = optimizer._session
    assert session is not None
    reduced = stratum_losses(values, None, session.rows)
    found = session.stratum_gradients(reduced, step=0).strata
    return [
        p.new_zeros((strata.num_strata, *p.shape)) if g is None else g.dense(p)
        for p, g in zip(session.parameters, found, strict=True)
    ]


def assert_exact(
    model: nn.Module, losses: Callable[[], Tensor], strata: StrataIndex, row_ids: Tensor
) -> None:
    expected = autograd_stratum_gradients(
        losses, row_ids, list(model.parameters()), strata.num_strata
    )
    got = one_pass(model, losses, strata)
    dtype = next(model.parameters()).dtype
    for (name, _), mine, theirs in zip(model.named_parameters(), got, expected, strict=True):
        assert torch.isfinite(theirs).all()
        for s in range(strata.num_strata):
            scale = float(theirs.abs().max())
            error = float((mine[s] - theirs[s]).abs().max())
            # A gradient that is zero but for rounding (key biases under softmax, what lies below a
            # norm of two features) has no relative error; the largest gradient is the yardstick.
            floor = max(scale, 1e-2 * max(float(e.abs().max()) for e in expected))
            assert error <= TOL[dtype] * floor, (name, s, error / floor)


STRATA = {
    "sorted": ([0, 0, 1, 1, 2, 3], 4),
    "unsorted": ([3, 0, 2, 0, 1, 3], 4),
    "one-row and empty": ([4, 0, 0, 2, 2, 2], 6),
    "one stratum": ([0, 0, 0, 0, 0, 0], 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("ids", STRATA)
def test_sasrec_with_tied_padded_table(ids: str, loss: str, dtype: torch.dtype) -> None:
    strata, num_strata = STRATA[ids]
    batch = ragged_batch(
        strata, [3, 1, 7, 12, 2, 5], num_strata=num_strata, num_items=40, num_negatives=2
    )
    torch.manual_seed(1)
    model = SASRec(40, max_len=12, dim=16, num_heads=2, dropout=0.0, loss=loss).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert batch.strata.events is not None
    assert_exact(model, lambda: model(batch), batch.strata, batch.strata.events.ids)


def test_dropout_keeps_one_pass_exact() -> None:
    batch = ragged_batch([0, 1, 1, 2], [4, 9, 2, 6], num_strata=3, num_items=30)
    model = SASRec(30, max_len=10, dim=16, dropout=0.5).double()

    def losses() -> Tensor:
        torch.manual_seed(7)  # the same masks for the oracle and the library
        return model(batch)

    assert batch.strata.events is not None
    assert_exact(model, losses, batch.strata, batch.strata.events.ids)


class Padded(nn.Module):
    """A padded [B, L] model as people write it: position table added, tied `h @ E.T`."""

    def __init__(self, num_items: int, length: int, dim: int) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, length, dim))
        self.gate = nn.Parameter(torch.randn(dim))
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Linear(dim, dim)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.items(ids) + self.positions[:, : ids.shape[1]]
        x = self.norm(x + torch.tanh(self.mix(x)) * self.gate)
        state = x.cumsum(1)  # causal, mixes positions of a user, never users
        logits = state @ self.items.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
            ids.shape
        )


@pytest.mark.parametrize("transpose", ["T", "mT", "t()", "linear"])
def test_padded_model_with_tied_matmul_and_position_table(transpose: str) -> None:
    torch.manual_seed(0)
    model = Padded(20, 9, 8).double()
    ids = torch.randint(0, 21, (7, 5))
    targets = torch.randint(1, 21, (7, 5))
    strata = StrataIndex(torch.tensor([2, 0, 1, 1, 0, 2, 2]), 3)
    tied = {
        "T": lambda state, table: state @ table.T,
        "mT": lambda state, table: torch.matmul(state, table.mT),
        "t()": lambda state, table: state.matmul(table.t()),
        "linear": F.linear,
    }[transpose]

    def losses() -> Tensor:
        x = model.norm(model.items(ids) + model.positions[:, :5])
        x = x + torch.tanh(model.mix(x)) * model.gate
        logits = tied(x.cumsum(1), model.items.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(7, 5)

    row_ids = strata.ids.repeat_interleave(5)
    assert_exact(model, losses, strata, row_ids)
    assert_exact(model, lambda: model(ids, targets), strata, row_ids)


def test_padding_row_of_the_table_gets_no_gradient() -> None:
    table = nn.Embedding(6, 4, padding_idx=0).double()
    ids = torch.tensor([[0, 1, 2], [0, 0, 5]])
    strata = StrataIndex(torch.tensor([0, 1]), 2)
    got = one_pass(table, lambda: table(ids).pow(2).sum((1, 2)), strata)[0]
    assert torch.equal(got[:, 0], torch.zeros(2, 4, dtype=torch.float64))
    assert (got[0, 1] != 0).all()
    assert (got[1, 5] != 0).all()


def test_derived_parameters_are_pushed_back() -> None:
    """Weight normalisation computed inside: the boundary sees a tensor made of two parameters."""

    class WeightNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.randn(5, 4))
            self.g = nn.Parameter(torch.rand(5, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True))

    torch.manual_seed(0)
    model = WeightNorm().double()
    x = torch.randn(6, 4, dtype=torch.float64)
    strata = StrataIndex(torch.tensor([0, 1, 1, 0, 2, 0]), 3)
    assert_exact(model, lambda: model(x).pow(2).sum(1), strata, strata.ids)


def test_view_made_before_the_context_is_a_root() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 5, bias=False).double()
    view = model.weight.T
    x = torch.randn(6, 4, dtype=torch.float64)
    strata = StrataIndex(torch.tensor([0, 1, 1, 0, 2, 0]), 3)
    assert_exact(model, lambda: (x @ view).pow(2).sum(1), strata, strata.ids)


def test_parameter_used_twice_and_foreign_leaf() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    foreign = nn.Linear(4, 4).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    strata = StrataIndex(torch.tensor([1, 0, 1, 0, 1]), 2)

    def losses() -> Tensor:
        return layer(torch.tanh(foreign(torch.tanh(layer(x))))).pow(2).sum(1)

    assert_exact(layer, losses, strata, strata.ids)
    foreign.zero_grad()
    optimizer = GradientAggregator(torch.optim.SGD(layer.parameters(), lr=0.1), "agreement")
    with optimizer.stratify(strata):
        values = losses()
    optimizer.backward(values)
    stratum_means = [values[strata.ids == s].mean() for s in range(2)]
    expected = torch.autograd.grad(
        sum(losses()[strata.ids == s].mean() for s in range(len(stratum_means))),
        foreign.weight,
    )[0]
    assert foreign.weight.grad is not None
    assert relative_error(foreign.weight.grad, expected) < 1e-12


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_linear_norm_and_embedding_on_any_batch(data: st.DataObject) -> None:
    num_strata = data.draw(st.integers(1, 5), label="S")
    num_users = data.draw(st.integers(1, 9), label="B")
    ids = data.draw(
        st.lists(st.integers(0, num_strata - 1), min_size=num_users, max_size=num_users)
    )
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=num_users, max_size=num_users))
    width = data.draw(st.integers(2, 7), label="d")  # LayerNorm of one value is 0/0
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = nn.Sequential(
        nn.Embedding(11, width, padding_idx=0), nn.LayerNorm(width), nn.Linear(width, 3)
    ).double()
    values = torch.randint(0, 11, (sum(lengths),))
    strata = StrataIndex(torch.tensor(ids), num_strata, torch.tensor(lengths))
    assert strata.events is not None
    expanded = torch.rand(1, dtype=torch.float64).expand(3)  # a stride-0 gradient arrives
    assert_exact(model, lambda: model(values) @ expanded, strata, strata.events.ids)


@pytest.mark.parametrize("op", ["linear", "no bias", "matmul"])
def test_the_forward_is_bit_identical_for_strided_rows(op: str) -> None:
    """torch takes another path for weights that require no gradient; the ops must not."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(9, 4, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.randn(9, dtype=torch.float64))
    x = torch.randn(7, 5, 4, dtype=torch.float64).transpose(0, 1)

    def forward() -> Tensor:
        if op == "matmul":
            return x @ weight.T
        return torch.nn.functional.linear(x, weight, bias if op == "linear" else None)

    plain = forward()
    opt = GradientAggregator(torch.optim.SGD([weight, bias], lr=0.1), "agreement")
    with opt.stratify(torch.tensor([2, 0, 1, 1, 0, 2, 2])):
        assert torch.equal(forward(), plain)
