"""Tables with far fewer rows than a batch looks up: their stratum gradients come in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.lanes import Batch, boundaries_in_python, compare, lane, per_row
from support.oracle import autograd_stratum_gradients, relative_error
from torch import Tensor, nn

from pinet_fast import GradientAggregator
from pinet_fast.aggregation.lane import refusal

S, D, N = 3, 4, 24
IDS = torch.arange(N) % S


class Table(nn.Module):
    """A table, and a layer that what is looked up goes through."""

    def __init__(self, num_rows: int, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(num_rows, D, **options)
        self.up = nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.up(self.table(ids))).square().sum(1)


def gradient_of(model: Table, ids: Tensor, rule: str = "agreement") -> Any:
    """Return the stratum gradients of the table as one backward leaves them."""
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), rule)
    with opt.stratify(IDS, num_strata=S):
        losses = model(ids)
    opt.backward(losses)
    return next(g for p, g in opt._pending.touched() if p is model.table.weight)


@pytest.mark.parametrize(
    ("num_rows", "is_full"), [(1, True), (5, True), (6, True), (7, False), (1024, False)]
)
def test_gradients_are_those_of_autograd(num_rows: int, is_full: bool) -> None:
    """In full up to a quarter of the lookups; rows that no user of a stratum reads are 0."""
    torch.manual_seed(0)
    model = Table(num_rows).double()
    ids = torch.randint(max(num_rows - 1, 1), (N,))  # nobody reads the last row
    found = gradient_of(model, ids)
    assert (found.rows is None) == is_full
    (expected,) = autograd_stratum_gradients(lambda: model(ids), IDS, [model.table.weight], S)
    assert relative_error(found.dense(model.table.weight), expected) < 1e-12
    if num_rows > 1:
        assert (found.dense(model.table.weight)[:, -1] == 0).all()


def test_a_large_table_is_never_in_full() -> None:
    model, ids = Table(1025), torch.randint(1025, (N, 200))
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS, num_strata=S):
        losses = model.table(ids).sum((1, 2))
    opt.backward(losses)
    ((_, found),) = opt._pending.touched()
    assert found.rows is not None


@pytest.mark.parametrize("rule", ["trimmedmean", "signagreement"])
def test_elementwise_rules_are_told_who_touched_what(rule: str) -> None:
    model = Table(4)
    ids = IDS.clone()  # stratum s reads row s
    found = gradient_of(model, ids, rule)
    assert found.touched.tolist() == torch.eye(S).bool().tolist()
    assert (model.table.weight.grad[:S] != 0).all()


def test_sparse_tables_stay_sparse() -> None:
    model = Table(4, sparse=True)
    found = gradient_of(model, torch.randint(4, (N,)))
    assert found.is_sparse
    assert model.table.weight.grad is not None
    assert model.table.weight.grad.is_sparse


def test_padding_has_no_gradient() -> None:
    model = Table(4, padding_idx=0)
    found = gradient_of(model, torch.randint(4, (N,)))
    assert found.rows is None
    assert (found.values[:, 0] == 0).all()
    assert (found.values[:, 1:] != 0).any()


def test_accumulated_backwards_add_up_whatever_their_sizes() -> None:
    torch.manual_seed(0)
    model = Table(6).double()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    total = torch.zeros(S, *model.table.weight.shape, dtype=torch.float64)
    for count in (N, N // 2):  # in full, then by rows
        ids, strata = torch.randint(6, (count,)), IDS[:count]
        with opt.stratify(strata, num_strata=S):
            losses = model(ids)
        opt.backward(losses)
        total += autograd_stratum_gradients(
            lambda ids=ids: model(ids), strata, [model.table.weight], S
        )[0]
    found = next(g for p, g in opt._pending.touched() if p is model.table.weight)
    assert relative_error(found.dense(model.table.weight), total) < 1e-12


class Positions(nn.Module):
    """A small table looked up twice, with padding, beside an item table."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(40, D, padding_idx=0)
        self.positions = nn.Embedding(4, D, padding_idx=1)
        self.out = nn.Linear(D, D)

    def forward(self, batch: Batch) -> Tensor:
        x = self.items(batch.ids(40, batch.num_rows))
        x = x + self.positions(batch.ids(4, batch.num_rows, salt=1))
        return per_row(self.out(x * self.positions(batch.ids(4, batch.num_rows, salt=2))))


@pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")
@pytest.mark.parametrize(("num_rows", "is_full"), [(6, True), (7, False)])
def test_the_lane_calls_the_same_tables_small(num_rows: int, is_full: bool) -> None:
    model = Table(num_rows)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with lane(True):
        for _ in range(5):
            opt.zero_grad()
            with opt.stratify(IDS, num_strata=S), boundaries_in_python() as seen:
                losses = model(torch.randint(num_rows, (N,)))
            opt.backward(losses)
    assert seen.total() == 0
    found = next(g for p, g in opt._pending.touched() if p is model.table.weight)
    assert (found.rows is None) == is_full


@pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")
@pytest.mark.parametrize("rule", ["agreement", "balanced", "trimmedmean"])
@pytest.mark.parametrize("backend", ["", "reference"])
def test_the_lane_changes_no_bit(rule: str, backend: str, monkeypatch: Any) -> None:
    if backend:
        monkeypatch.setenv("PINET_FAST_BACKEND", backend)
    steps = [Batch([*range(S), 0, 2], [7, 5, 6, 4, 3 + i], S, seed=i) for i in range(6)]
    ours, theirs = compare(Positions, steps, forward=lambda m, b: m(b), rule=rule)
    assert ours.num_in_python[-1] == 0
    assert theirs.num_in_python[-1] > 0
    ran = dict(ours.entries[-1]["calls of kernels"])
    assert (ran.get(("stratified_embedding_add", backend or "cpp"), 0) > 0) == (
        rule != "trimmedmean"
    )
