"""What the errors of an aggregated step say: what, where, expected, got, and a fix to paste."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from grid.contract import IDS, S, X, network
from pinet_fast import GradientAggregator
from pinet_fast.errors import BoundaryError, PinetError, RowLayoutError, StratumLeakError

if TYPE_CHECKING:
    from collections.abc import Callable


class InBatch(nn.Module):
    """Every user's loss sees all users' items."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Linear(3, 4)
        self.items = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.users(x) @ self.items(torch.arange(len(x))).T
        return scores.logsumexp(1)


def in_batch() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return InBatch().double(), lambda model: model(X)


def undecided() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = torch.randn(7, 7, 3, dtype=torch.float64)
    return network(), lambda model: model(x).pow(2).sum((1, 2))


def batch_norm() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    return model, lambda m: m(X).pow(2).sum(1)


def losses_of_others() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return network(), lambda model: model(X).pow(2).sum(1)[:4]


# name -> (attempt, error, what its message must contain)
MESSAGES: dict[str, tuple[Any, type[PinetError], tuple[str, ...]]] = {
    "a loss that mixes users": (
        in_batch,
        StratumLeakError,
        (
            r"items\.weight",
            r"\d",  # the size of the leak
            r"shared\(\)",
            r"rows=",
            r'GradientAggregator\(\.\.\., leaks="attribute-by-row"\)',
            r'mode="exact"',
        ),
    ),
    "L == B": (undecided, RowLayoutError, (r"0\.weight", "linear", r"\[7, 7", "7", r"rows=")),
    "batch statistics": (
        batch_norm,
        BoundaryError,
        ("batch_norm", r"1\.weight", "LayerNorm|GroupNorm", r'eval|mode="exact"'),
    ),
    "losses of other rows": (losses_of_others, RowLayoutError, (r"\[4\]", "7", r"\[B\]|users")),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name: str) -> None:
    torch.manual_seed(0)
    attempt, error, patterns = MESSAGES[name]
    model, losses_of = attempt()
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = GradientAggregator(sgd, "agreement", num_strata=S)

    def step() -> None:
        with opt.stratify(IDS):
            losses = losses_of(model)
        opt.backward(losses)

    with pytest.raises(error) as raised:
        step()
    text = str(raised.value) + "\n".join(getattr(raised.value, "__notes__", []))
    missing = [p for p in patterns if not re.search(p, text)]
    assert not missing, f"the message lacks {missing}:\n{text}"
