"""Work whose rows belong to no user, and what else is computed from parameters alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.errors import AggregationError, BoundaryError, StratumLeakError

IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2])
B, V, D, S = 7, 11, 4, 3
X = torch.randn(B, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ITEMS = torch.tensor([1, 5, 2, 2, 8, 0, 3])


class Retrieval(nn.Module):
    """Two towers with in-batch negatives: every user's loss uses every user's item."""

    def __init__(self, *, item_tower: bool = False, shares_rows: bool = False) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, D))
        self.items = nn.Embedding(V, D)
        self.tower = nn.Linear(D, D) if item_tower else nn.Identity()
        self.shares_rows = shares_rows

    def pool(self, users: Tensor) -> Tensor:
        pool = self.tower(self.items(ITEMS))
        if self.shares_rows:  # what other users look like takes part in the candidates
            pool = torch.tanh(self.tower(pool + users.mean(0)))
        return pool

    def losses(self, opt: GradientAggregator | None = None) -> Tensor:
        users = self.user(X)
        if opt is None:
            pool = self.pool(users)
        else:
            with opt.shared():
                pool = self.pool(users)
        return F.cross_entropy(users @ pool.T, torch.arange(B), reduction="none")


@pytest.mark.parametrize("item_tower", [False, True])
@pytest.mark.parametrize("shares_rows", [False, True])
def test_in_batch_negatives_are_exact(item_tower: bool, shares_rows: bool) -> None:
    torch.manual_seed(0)
    model = Retrieval(item_tower=item_tower, shares_rows=shares_rows).double()
    parameters = list(model.parameters())
    expected = autograd_stratum_gradients(model.losses, IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            losses = model.losses(opt)
        opt.backward(losses)
        assert opt.report.leak == "proven"

    for got, theirs in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-12)


def test_without_shared_it_is_a_leak_that_names_it() -> None:
    model = Retrieval().double()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS):
        losses = model.losses()
    with pytest.raises(StratumLeakError, match=r"opt\.shared\(\)"):
        opt.backward(losses)


def test_attribution_by_row_is_said_and_adds_up() -> None:
    """Whoever's loss it comes from, all of the gradient is somewhere."""
    torch.manual_seed(0)
    model = Retrieval().double()
    parameters = list(model.parameters())
    by_loss = autograd_stratum_gradients(model.losses, IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            losses = model.losses()
        opt.backward(losses)
        assert opt.report.leak == "attributed-by-row"

    by_row = stratum_gradients(parameters, S, run, leaks="attribute-by-row")
    moved = 0.0
    for got, theirs in zip(by_row, by_loss, strict=True):
        torch.testing.assert_close(got.sum(0), theirs.sum(0), rtol=1e-10, atol=1e-12)
        moved = max(moved, float((got - theirs).abs().max()))
    assert moved > 1e-3


def test_a_large_table_in_shared_keeps_its_gradient_to_touched_rows() -> None:
    table = nn.Embedding(50_000, D)
    users = nn.Linear(5, D)
    parameters = [*table.parameters(), *users.parameters()]
    opt = GradientAggregator(torch.optim.SGD(parameters, lr=0.1), "agreement")
    with opt.stratify(IDS):
        with opt.shared():
            pool = table(ITEMS)
        losses = F.cross_entropy(users(X.float()) @ pool.T, torch.arange(B), reduction="none")
    session = opt._session
    assert session is not None
    opt.backward(losses)
    (gradient,) = (g for p, g in opt._pending.touched() if p is table.weight)
    assert gradient.rows is not None
    assert gradient.rows.tolist() == sorted(set(ITEMS.tolist()))
    assert table.weight.grad is not None
    assert not table.weight.grad.is_sparse


def test_shared_needs_a_context() -> None:
    opt = GradientAggregator(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(AggregationError, match="only inside"), opt.shared():
        pass


def test_shared_under_a_constant_rule_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Retrieval().double()
    gradients = []
    for shared in (False, True):
        opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "joint")
        opt.zero_grad()
        with opt.stratify(IDS):
            losses = model.losses(opt if shared else None)
        opt.backward(losses)
        assert model.items.weight.grad is not None
        gradients.append(model.items.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_parameter_that_meets_reduced_rows_is_refused() -> None:
    first, second = nn.Linear(5, D), nn.Linear(D, D)
    opt = GradientAggregator(
        torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1), "agreement"
    )
    with pytest.raises(BoundaryError, match=r"has none left.*opt\.shared\(\)"), opt.stratify(IDS):
        second(first(X.float()).mean(0))


def test_foreign_tensors_in_derived_ones_keep_their_gradient() -> None:
    """A tensor that is not the optimizer's gets the gradient of the summed stratum losses."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
    scale = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def losses() -> Tensor:
        return F.linear(X, weight * scale.exp()).pow(2).sum(1)

    expected = autograd_stratum_gradients(losses, IDS, [weight, scale], S)
    opt = GradientAggregator(torch.optim.SGD([weight], lr=0.1), "agreement")
    with opt.stratify(IDS):
        values = losses()
    opt.backward(values)
    torch.testing.assert_close(scale.grad, expected[1].sum(0), rtol=1e-10, atol=1e-12)
    assert opt.report.gram is not None
    flat = expected[0].flatten(1)
    torch.testing.assert_close(opt.report.gram, flat @ flat.T, rtol=1e-9, atol=1e-12)
