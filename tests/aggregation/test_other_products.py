"""Products of rows and a parameter in any form: those without a boundary rule of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from pinet_fast.aggregation import GradientAggregator

IDS, S = torch.tensor([2, 0, 1, 1, 0, 2, 2]), 3
_DRAW = torch.Generator().manual_seed(0)
X = torch.randn(7, 5, dtype=torch.float64, generator=_DRAW)
Y = torch.randn(7, 5, 4, dtype=torch.float64, generator=_DRAW)
BY_HEAD = Y.transpose(0, 1)  # [5, 7, 4]: users are dimension 1

PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "W @ x.T": (lambda w: (w @ X.T).T, ((3, 5),)),
    "W @ y": (lambda w: w @ Y, ((3, 5),)),
    "x @ w": (lambda w: X @ w, ((5,),)),
    "mv": (lambda w: torch.mv(X, w), ((5,),)),
    "a matrix a head": (lambda w: (BY_HEAD @ w).transpose(0, 1), ((5, 4, 2),)),
    "baddbmm": (
        lambda w, b: torch.baddbmm(b, BY_HEAD, w).transpose(0, 1), ((5, 4, 2), (5, 1, 2)),
    ),
    "tensordot": (lambda w: torch.tensordot(Y, w, dims=([2], [0])), ((4, 2),)),
    "quadratic": (lambda w: (X @ w) * X, ((5, 5),)),
    "conv2d": (lambda w: F.conv2d(Y.unsqueeze(1), w), ((2, 1, 2, 2),)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_stratum_gradients(name: str) -> None:
    product, shapes = PRODUCTS[name]
    draw = torch.Generator().manual_seed(1)
    parameters = [
        nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=draw)) for shape in shapes
    ]

    def losses() -> Tensor:
        out = product(*parameters).tanh()
        return out if out.dim() == 1 else out.flatten(1).sum(1)

    expected = autograd_stratum_gradients(losses, IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            values = losses()
        opt.backward(values)
        assert opt.report.leak == "proven"

    for got, wanted in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
        assert wanted.abs().amax(tuple(range(1, wanted.dim()))).gt(0).all()
