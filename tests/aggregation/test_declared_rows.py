"""Row layouts that the user declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.errors import AggregationError, RowLayoutError, StrataError

if TYPE_CHECKING:
    from collections.abc import Mapping

IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2])
B, H, D, S = 7, 3, 4, 3


class HeadMajor(nn.Module):
    """Rows [H * B, D] with the heads outside: neither size nor graph tells the users apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight)).view(H, B, D).square().sum((0, 2))


def test_a_declared_layout_is_taken() -> None:
    torch.manual_seed(0)
    model = HeadMajor().double()
    x = torch.randn(H * B, D, dtype=torch.float64)
    parameters = list(model.parameters())
    expected = autograd_stratum_gradients(lambda: model(x), IDS, parameters, S)
    rows: Mapping[str, tuple[int, Tensor]] = {"parameter 0 of group 0": (0, IDS.repeat(H))}

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS, rows=rows):
            losses = model(x)
        opt.backward(losses)
        assert opt.report.leak == "proven"
        assert [entry.rows for entry in opt.coverage()] == ["declared"]

    for got, theirs in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-12)


def test_without_a_declaration_it_is_a_leak() -> None:
    model = HeadMajor()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS):
        losses = model(torch.randn(H * B, D))
    with pytest.raises(AggregationError, match="rows="):
        opt.backward(losses)


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        ((1, IDS), RowLayoutError, "declares 7 rows in dimension 1"),
        ((0, IDS), RowLayoutError, "declares 7 rows in dimension 0"),
        ((0, IDS.repeat(H) + 1), StrataError, "out of range"),
    ],
)
def test_a_wrong_declaration(rows: tuple[int, Tensor], error: type[Exception], match: str) -> None:
    model = HeadMajor()
    opt = GradientAggregator(
        torch.optim.SGD(model.named_parameters(), lr=0.1), "agreement", num_strata=S
    )
    with pytest.raises(error, match=match), opt.stratify(IDS, rows={"weight": rows}):
        model(torch.randn(H * B, D))
