"""What the errors propose, and the ways around ``opt.backward(losses)``: each exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from grid.contract import (
    IDS,
    S,
    X,
    aggregator,
    assert_gradients,
    losses_of,
    network,
    one_hot,
    stratum_gradients,
)
from pinet_fast.errors import AggregationError, PinetError
from pinet_fast.rules import Backdoor

if TYPE_CHECKING:
    from collections.abc import Callable

MASK = torch.tensor([1.0, 0.5, 1.0, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
PRIOR = [0.2, 0.3, 0.5]


def weighted(model: nn.Module, weights: Tensor) -> list[Tensor]:
    """Return sum_s PRIOR[s] g_s of weighted stratum means, by plain autograd."""
    values = losses_of(model)
    total = values.new_zeros(())
    for s, share in enumerate(PRIOR):
        rows = s == IDS
        total = total + share * (values * weights)[rows].sum() / weights[rows].sum()
    return list(torch.autograd.grad(total, list(model.parameters())))


# Scalars of untouched loops: how many rows the scalar says it has been divided by.
SCALARS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any], Tensor]] = {
    "mean": (lambda v: v.mean(), {"reduction": "mean"}, torch.ones(7)),
    "sum": (lambda v: v.sum(), {"reduction": "sum"}, torch.ones(7)),
    "masked mean": (
        lambda v: (v * MASK).sum() / MASK.sum(),
        {"reduction": "mean", "row_weights": MASK},
        MASK,
    ),
    "masked sum": (
        lambda v: (v * MASK).sum(),
        {"reduction": "sum", "row_weights": MASK},
        MASK,
    ),
}


@pytest.mark.parametrize("every", [None, 1], ids=["reweighted", "one-pass"])
@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("kind", SCALARS)
def test_untouched_loops_may_call_backward_on_a_scalar(
    kind: str, place: str, every: int | None
) -> None:
    reduce, options, weights = SCALARS[kind]
    model = network()
    expected = weighted(model, weights.double())
    opt = aggregator(model, Backdoor(PRIOR), every)
    with opt.stratify(IDS, **options):
        loss = reduce(losses_of(model))
        if place == "inside":
            loss.backward()
    if place == "after":
        loss.backward()
    assert_gradients(model, expected)  # complete when backward returns
    opt.step()


def test_scaled_scalar_and_accumulation() -> None:
    """GradScaler's scaled loss twice: the sum of both, scaled."""
    model = network()
    expected = [2 * 8.0 * g for g in weighted(model, torch.ones(7).double())]
    opt = aggregator(model, Backdoor(PRIOR))
    for _ in range(2):
        with opt.stratify(IDS, reduction="mean"):
            loss = losses_of(model).mean()
        (8.0 * loss).backward()
    assert_gradients(model, expected)


def test_an_l2_term_on_a_scalar_loss_is_added_once() -> None:
    """As the well-known SASRec port writes it: the mean first, then ``loss += l2 * norm``."""
    model = network()
    data = weighted(model, torch.ones(7).double())
    norms = [p.detach() / p.detach().norm() for p in model.parameters()]
    opt = aggregator(model, Backdoor(PRIOR))
    with opt.stratify(IDS, reduction="mean"):
        loss = losses_of(model).mean()
        for p in model.parameters():
            loss = loss + 0.1 * torch.norm(p)
    loss.backward()
    assert_gradients(model, [g + 0.1 * n for g, n in zip(data, norms, strict=True)])


@pytest.mark.parametrize("rule", ["agreement", "backdoor"])
def test_a_scalar_without_its_reduction_is_refused(rule: str) -> None:
    """At once where gradients are intercepted; for constant rules, which are not, by the step."""
    model = network()
    opt = aggregator(model, rule)

    def step() -> None:
        with opt.stratify(IDS):
            loss = losses_of(model).mean()
        loss.backward()
        opt.step()

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(AggregationError, match="reduction="):
        step()
    assert all(map(torch.equal, model.parameters(), before))
    opt.zero_grad()


@pytest.mark.parametrize("wrong", ["average", "none", 3])
def test_unknown_reductions_are_refused(wrong: Any) -> None:
    opt = aggregator(network())
    with (
        pytest.raises(PinetError, match=r"reduction.*mean.*sum"),
        opt.stratify(IDS, reduction=wrong),
    ):
        pass


@pytest.mark.parametrize("rule", ["mgda", "balanced"])
def test_an_l2_term_is_added_once_after_the_rule(rule: str) -> None:
    """Whatever the weights sum to: the term has no rows, so no stratum owns it."""
    model = network()
    expected = stratum_gradients(model)
    opt = aggregator(model, rule)
    with opt.stratify(IDS):
        penalty = 0.1 * sum(p.pow(2).sum() for p in model.parameters())
        losses = losses_of(model) + penalty
    opt.backward(losses)
    weights, gram = opt.report.weights, opt.report.gram
    assert weights is not None
    assert gram is not None
    flat = torch.cat([g.flatten(1) for g in expected], dim=1)
    torch.testing.assert_close(gram, flat @ flat.T, rtol=1e-9, atol=1e-12)
    assert_gradients(
        model,
        [
            torch.einsum("s,s...->...", weights, g) + 0.2 * p.detach()
            for g, p in zip(expected, model.parameters(), strict=True)
        ],
    )


class TwoTowers(nn.Module):
    """In-batch negatives: logits [B, B] of users against all users' items."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Linear(3, 4)
        self.items = nn.Embedding(9, 4)

    def forward(self, x: Tensor, candidates: Tensor) -> Tensor:
        logits = self.users(x) @ candidates.T
        return F.cross_entropy(logits, torch.arange(len(x)), reduction="none")


ITEMS = torch.tensor([1, 5, 2, 2, 8, 0, 3])


def test_attribution_by_row() -> None:
    """The gradient that reaches a row belongs to the row's own stratum, whichever loss sent it."""
    torch.manual_seed(0)
    model = TwoTowers().double()
    parameters = [*model.parameters()]
    candidates = model.items(ITEMS)
    values = model(X, candidates)
    total = sum(values[s == IDS].mean() for s in range(S))
    assert isinstance(total, Tensor)
    by_row = torch.autograd.grad(total, candidates, retain_graph=True)[0]
    own = autograd_stratum_gradients(lambda: model(X, model.items(ITEMS)), IDS, parameters, S)
    for s in range(S):
        table = torch.zeros_like(model.items.weight)
        table.index_add_(0, ITEMS[s == IDS], by_row[s == IDS])
        opt = aggregator(model, Backdoor(one_hot(s)), leaks="attribute-by-row")
        opt.zero_grad()
        with opt.stratify(IDS):
            losses = model(X, model.items(ITEMS))
        opt.backward(losses)
        assert_gradients(model, [own[0][s], own[1][s], table])
        assert opt.report.leak != "proven"


def test_exact_mode_takes_batch_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    expected = stratum_gradients(model)
    opt = aggregator(model, Backdoor(one_hot(2)), mode="exact")
    with opt.stratify(IDS):
        losses = losses_of(model)
    opt.backward(losses)
    assert opt.report.mode == "exact"
    assert_gradients(model, [g[2] for g in expected])


def test_shared_work_may_also_be_a_loss_free_pool() -> None:
    """A candidate pool of another size than the batch, scored by every user."""
    torch.manual_seed(0)
    model = TwoTowers().double()
    pool = torch.tensor([4, 4, 7, 1, 0])

    def losses(candidates: Tensor) -> Tensor:
        return (model.users(X) @ candidates.T).logsumexp(1)

    expected = autograd_stratum_gradients(
        lambda: losses(model.items(pool)), IDS, [*model.parameters()], S
    )
    opt = aggregator(model, Backdoor(one_hot(0)))
    with opt.stratify(IDS):
        with opt.shared():
            candidates = model.items(pool)
        values = losses(candidates)
    opt.backward(values)
    assert_gradients(model, [g[0] for g in expected])


def test_shared_outside_a_context_is_refused() -> None:
    opt = aggregator(network())
    with pytest.raises(AggregationError, match="stratify"), opt.shared():
        pass


@pytest.mark.parametrize(
    ("absent", "shares"), [("renormalise", [0.4, 0.6, 0.0]), ("skip", [0.2, 0.3, 0.0])]
)
@pytest.mark.parametrize("every", [None, 1], ids=["reweighted", "one-pass"])
def test_absent_strata(absent: str, shares: list[float], every: int | None) -> None:
    """``"skip"`` leaves the weights of the others as they were."""
    model = network()
    ids = IDS.clamp(max=1)
    expected = stratum_gradients(model, ids)
    opt = aggregator(model, Backdoor(PRIOR), every, absent=absent)
    with opt.stratify(ids):
        losses = losses_of(model)
    opt.backward(losses)
    assert opt.report.weights is not None
    assert opt.report.weights.tolist() == pytest.approx(shares)
    mix = torch.tensor(shares, dtype=torch.float64)
    assert_gradients(model, [torch.einsum("s,s...->...", mix, g) for g in expected])


def test_coverage_lists_every_use() -> None:
    model = network()
    opt = aggregator(model)
    for _ in range(2):
        opt.zero_grad()
        with opt.stratify(IDS):
            losses = losses_of(model)
        opt.backward(losses)
        opt.step()
    entries = opt.coverage()
    names = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {e.parameter for e in entries} == names
    assert len(entries) == 4
    for entry in entries:
        assert entry.rule == "boundary"
        assert "linear" in entry.op
        assert isinstance(entry.proven, int)
    text = str(opt.coverage())
    assert all(name in text for name in names)
