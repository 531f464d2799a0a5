"""The leak check proves boundaries, and sees every leak that it can see."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator, StrataIndex
from pinet_fast.errors import ConfigError, RowLayoutError, StratumLeakError

if TYPE_CHECKING:
    from pinet_fast.aggregation.leak_check import CheckMode

STRATA = StrataIndex(torch.tensor([0, 1, 2, 1, 0, 2]), 3)


def aggregator(model: nn.Module, check: CheckMode = "first") -> GradientAggregator:
    return GradientAggregator(
        torch.optim.SGD(model.named_parameters(), lr=0.1), "agreement", check=check
    )


def step(opt: GradientAggregator, losses: Tensor) -> None:
    opt.backward(losses)
    opt.step()
    opt.zero_grad()


class Mixing(nn.Module):
    """In-batch interaction: every user sees the batch's mean state."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        state = self.inner(x)
        state = state + self.strength * state.mean(0)
        return self.outer(state).pow(2).sum(1)


@pytest.mark.parametrize("strength", [1.0, 1e-6])
def test_a_leak_is_named_and_writes_no_gradient(strength: float) -> None:
    model = Mixing(strength).double()
    opt = aggregator(model)
    x = torch.randn(6, 4, dtype=torch.float64)
    with opt.stratify(STRATA):
        losses = model(x)
    with pytest.raises(StratumLeakError, match=r"inner\.weight.*stratify\(strata, lengths"):
        opt.backward(losses)
    assert all(p.grad is None for p in model.parameters())


def test_after_a_leak_the_aggregator_still_works() -> None:
    leaking, clean = Mixing(1.0), Mixing(0.0)
    opt = aggregator(leaking)
    with opt.stratify(STRATA):
        losses = leaking(torch.randn(6, 4))
    with pytest.raises(StratumLeakError):
        opt.backward(losses)
    leaking.strength = 0.0
    with opt.stratify(STRATA):
        losses = leaking(torch.randn(6, 4))
    step(opt, losses)
    opt = aggregator(clean)
    with opt.stratify(STRATA):
        losses = clean(torch.randn(6, 4))
    step(opt, losses)
    assert opt.report.leak == "proven"


def test_never_does_not_look() -> None:
    model = Mixing(1.0)
    opt = aggregator(model, "never")
    with opt.stratify(STRATA):
        losses = model(torch.randn(6, 4))
    step(opt, losses)
    assert opt.report.leak == "unchecked"


def test_a_proven_site_is_not_checked_again_unless_always() -> None:
    for check, caught in (("first", False), ("always", True)):
        model = Mixing(0.0)
        opt = aggregator(model, check)  # type: ignore[arg-type]
        x = torch.randn(6, 4)
        with opt.stratify(STRATA):
            losses = model(x)
        step(opt, losses)
        model.strength = 1.0
        with opt.stratify(STRATA):
            losses = model(x)
        if caught:
            with pytest.raises(StratumLeakError):
                opt.backward(losses)
        else:
            opt.backward(losses)


def test_a_zero_last_layer_hides_the_leak_and_leaves_the_site_armed() -> None:
    model = Mixing(1.0)
    nn.init.zeros_(model.outer.weight)
    nn.init.zeros_(model.outer.bias)
    opt = aggregator(model)
    x = torch.randn(6, 4)
    with opt.stratify(STRATA):
        losses = model(x) + model.outer(x).sum(1)
    step(opt, losses)
    assert opt.report.leak == "armed"
    unproven = [str(entry) for entry in opt.coverage().unproven]
    assert re.fullmatch(r"inner.weight: linear, \S+, users in dim 0, use 1: unproven", unproven[0])
    with opt.stratify(STRATA):  # the last layer moved: now the leak shows
        losses = model(x)
    with pytest.raises(StratumLeakError, match=r"inner"):
        opt.backward(losses)


def test_absent_strata_prove_nothing() -> None:
    model = Mixing(0.0)
    opt = aggregator(model)
    few = StrataIndex(torch.tensor([0, 1, 0, 1]), 3)
    with opt.stratify(few):
        losses = model(torch.randn(4, 4))
    step(opt, losses)
    assert opt.report.leak == "armed"
    with opt.stratify(STRATA):
        losses = model(torch.randn(6, 4))
    step(opt, losses)
    assert opt.report.leak == "proven"


def test_nan_beside_finite_gradients_counts_as_a_leak() -> None:
    model = nn.Linear(4, 4)
    opt = aggregator(model)
    x = torch.randn(6, 4)
    x[1] = torch.inf  # a row whose loss is masked away, but 0 * inf is NaN in its slice
    with opt.stratify(STRATA):
        losses = model(x).pow(2).sum(1)
        losses = torch.where(torch.arange(6) == 1, 0.0, losses)
    with pytest.raises(StratumLeakError, match="nan"):
        opt.backward(losses)


def test_an_overflow_is_no_leak_and_no_proof() -> None:
    model = nn.Linear(4, 4)
    opt = aggregator(model)
    with opt.stratify(STRATA):
        losses = model(torch.randn(6, 4)).pow(2).sum(1) * torch.inf
    opt.backward(losses)
    assert opt.report.leak == "armed"


def test_wrong_dimension_is_caught() -> None:
    """Rows of length L == B in another dimension: undecided sizes are refused, not guessed."""
    model = nn.Linear(4, 4)
    opt = aggregator(model)
    with pytest.raises(RowLayoutError, match="lengths"), opt.stratify(STRATA):
        model(torch.randn(6, 6, 4))


def test_time_major_lookalike_leaks() -> None:
    """A [L, d] table whose length equals B is no batch row: the check proves it wrong."""
    table = nn.Embedding(6, 4)
    layer = nn.Linear(4, 4)
    opt = GradientAggregator(
        torch.optim.SGD([*table.parameters(), *layer.parameters()], lr=0.1), "agreement"
    )
    with opt.stratify(STRATA):
        positions = table(torch.arange(6))  # taken for users: 6 rows
        losses = (layer(torch.randn(6, 4)) @ positions.T).pow(2).sum(1)
    with pytest.raises(StratumLeakError, match="embedding"):
        opt.backward(losses)


def test_a_thawed_parameter_is_proven_of_its_own() -> None:
    """Sites count parameters by position, which freezing and thawing shifts."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(requires_grad=False)
    opt = aggregator(model)
    x = torch.randn(6, 4)
    with opt.stratify(STRATA):
        losses = model(x).pow(2).sum(1)
    step(opt, losses)
    assert {e.parameter for e in opt.coverage()} == {"1.weight", "1.bias"}
    model[0].requires_grad_()
    with opt.stratify(STRATA):
        state = model[0](x)
        losses = model[1](state + state.mean(0)).pow(2).sum(1)  # a leak at 0.weight alone
    with pytest.raises(StratumLeakError, match=r"0\.weight"):
        opt.backward(losses)


def test_new_parameters_leave_proofs_as_they_are() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 2)
    opt = aggregator(first)
    x = torch.randn(6, 4)
    with opt.stratify(STRATA):
        losses = first(x).pow(2).sum(1)
    step(opt, losses)
    opt.add_param_group({"params": list(second.named_parameters())})
    with opt.stratify(STRATA):
        losses = second(first(x)).pow(2).sum(1)
    step(opt, losses)
    assert [entry.proven for entry in opt.coverage()] == [0, 0, 1, 1]


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match='"first", "never" or "always"'):
        aggregator(nn.Linear(2, 2), "sometimes")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_strata", range(2, 10))
def test_every_ordered_pair_is_tested(num_strata: int) -> None:
    """A leak from any one stratum to any other is seen, whatever their ids' bits."""
    ids = torch.arange(num_strata)
    for source in range(num_strata):
        target = (source + 1 + num_strata // 2) % num_strata
        if source == target:
            continue
        model = nn.Linear(3, 3)
        opt = aggregator(model)
        with opt.stratify(StrataIndex(ids, num_strata)):
            state = model(torch.randn(num_strata, 3))
            leak = torch.zeros(num_strata, num_strata)
            leak[source, target] = 1.0
            losses = (state + leak @ state).pow(2).sum(1)
        with pytest.raises(StratumLeakError):
            opt.backward(losses)
