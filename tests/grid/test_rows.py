"""Which rows: declared, chosen by a mask or by ids, or of no known size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
)
from pinet_fast.errors import PinetError
from pinet_fast.rules import Backdoor


class Square(nn.Module):
    """[B, L, 3] with L == B: a linear layer cannot tell users from events."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.inner(x)))


@pytest.mark.parametrize("dim", [0, 1])
def test_declared_rows_decide(dim: int) -> None:
    torch.manual_seed(0)
    model = Square().double()
    x = torch.randn(7, 7, 3, dtype=torch.float64)

    def losses() -> Tensor:
        return model(x).pow(2).sum((1 - dim, 2))

    expected = autograd_stratum_gradients(losses, IDS, [*model.parameters()], S)
    opt = aggregator(model, Backdoor(one_hot(1)))
    rows = {name: (dim, IDS) for name, _ in model.named_parameters()}
    with opt.stratify(IDS, rows=rows):
        values = losses()
    opt.backward(values)
    assert_gradients(model, [g[1] for g in expected])


def test_wrongly_declared_rows_are_a_leak() -> None:
    torch.manual_seed(0)
    model = Square().double()
    x = torch.randn(7, 7, 3, dtype=torch.float64)
    opt = aggregator(model)
    rows = {name: (1, IDS) for name, _ in model.named_parameters()}

    def step() -> None:
        with opt.stratify(IDS, rows=rows):
            losses = model(x).pow(2).sum((1, 2))
        opt.backward(losses)

    with pytest.raises(PinetError, match=r"inner\.weight|norm\.weight"):
        step()


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"inner.wieght": (0, IDS)}, r"inner\.wieght"),
        ({"inner.weight": (5, IDS)}, r"inner\.weight"),
        ({"inner.weight": (0, IDS[:4])}, r"inner\.weight"),
    ],
)
def test_bad_declarations_are_refused(rows: Any, match: str) -> None:
    model = Square().double()
    opt = aggregator(model)

    def step() -> None:
        with opt.stratify(IDS, rows=rows):
            losses = model(torch.randn(7, 7, 3, dtype=torch.float64)).pow(2).sum((1, 2))
        opt.backward(losses)

    with pytest.raises(PinetError, match=match):
        step()


def test_rows_of_no_known_size_are_never_silently_wrong() -> None:
    """Rows chosen before the ``with``: told by the graph or refused, but no batch-free term."""
    model = network()
    keep = torch.tensor([0, 2, 3, 5, 6])
    chosen = X[keep]

    def losses() -> Tensor:
        return torch.zeros(7).double().index_put((keep,), losses_of(model, chosen))

    expected = autograd_stratum_gradients(losses, IDS, [*model.parameters()], S)
    opt = aggregator(model, Backdoor(one_hot(1)))
    try:
        with opt.stratify(IDS):
            values = losses()
        opt.backward(values)
    except PinetError as error:
        assert "0.weight" in str(error)  # noqa: PT017  (either outcome will do)
    else:
        assert_gradients(model, [g[1] for g in expected])


@pytest.mark.parametrize("how", ["mask", "ids", "index_select"])
def test_chosen_rows_keep_their_layout(how: str) -> None:
    """As BERT4Rec scores masked events only: [B, L, d] to [chosen, d] inside the ``with``."""
    torch.manual_seed(0)
    model = Square().double()
    out = nn.Linear(4, 2).double()
    both = nn.ModuleList([model, out])
    x, mask = torch.randn(7, 4, 3, dtype=torch.float64), torch.rand(7, 4) < 0.6
    mask[:, 0] = True
    users, places = mask.nonzero(as_tuple=True)

    def losses() -> Tensor:
        hidden = model(x)
        if how == "mask":
            rows = hidden[mask]
        elif how == "ids":
            rows = hidden[users, places]
        else:
            rows = hidden.reshape(28, 4).index_select(0, users * 4 + places)
        return torch.zeros(7).double().index_add(0, users, out(rows).pow(2).sum(1))

    expected = autograd_stratum_gradients(losses, IDS, [*both.parameters()], S)
    for s in range(S):
        opt = aggregator(both, Backdoor(one_hot(s)))
        opt.zero_grad()
        with opt.stratify(IDS):
            values = losses()
        opt.backward(values)
        assert_gradients(both, [g[s] for g in expected])


class Joined(nn.Module):
    """Parts of chosen rows side by side: 5 rows of 7 users, [5, 6] from two [5, 3]."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last = nn.Linear(6, 2)
        self.flat = flat

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        parts = [torch.tanh(part(x))[chosen] for part in (self.first, self.second)]
        if self.flat:  # the rows themselves are concatenated: nothing tells whose they are
            return self.last(torch.cat(parts, 0).repeat(1, 2))
        return self.last(torch.cat(parts, 1))


def test_rows_are_followed_through_parts_side_by_side() -> None:
    torch.manual_seed(0)
    model, x = Joined().double(), torch.randn(7, 3, dtype=torch.float64)
    chosen = torch.tensor([6, 1, 1, 4, 0])

    def losses() -> Tensor:
        each = model(x, chosen).pow(2).sum(1)
        return torch.zeros(7, dtype=torch.float64).index_add(0, chosen, each)

    expected = autograd_stratum_gradients(losses, IDS, [*model.parameters()], S)
    opt = aggregator(model, Backdoor(one_hot(1)))
    with opt.stratify(IDS):
        values = losses()
    opt.backward(values)
    assert_gradients(model, [g[1] for g in expected])


def test_rows_one_after_the_other_are_not_guessed() -> None:
    model, x = Joined(flat=True).double(), torch.randn(7, 3, dtype=torch.float64)
    opt = aggregator(model)
    with pytest.raises(PinetError), opt.stratify(IDS):
        model(x, torch.tensor([6, 1, 1, 4, 0]))
