"""Tables with ``sparse=True``: gradients stay sparse, in every mode and under every rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grid.contract import IDS, S, X
from pinet_fast import GradientAggregator, rules

NUM_ITEMS = 50
ITEMS = torch.tensor([[1, 5], [2, 2], [8, 0], [3, 1], [5, 5], [40, 2], [2, 0]])


class Table(nn.Module):
    """Two items a user, summed, beside a dense layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS, 4, padding_idx=0, sparse=sparse)
        self.users = nn.Linear(3, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.users(X) + self.items(ids).sum(1)).pow(2).sum(1)


def aggregator(model: Table, rule: Any = "agreement", **options: Any) -> GradientAggregator:
    optimizers = [
        torch.optim.Adam(model.users.parameters(), lr=0.01),
        torch.optim.SparseAdam(model.items.parameters(), lr=0.01),
    ]
    return GradientAggregator(optimizers, rule, num_strata=S, **options)  # type: ignore[arg-type]


def backward(opt: GradientAggregator, model: Table, ids: Tensor = ITEMS) -> None:
    with opt.stratify(IDS):
        losses = model(ids)
    opt.backward(losses)


@pytest.mark.parametrize("mode", ["one-pass", "exact"])
@pytest.mark.parametrize("rule", rules.names())
def test_sparse_and_dense_tables_agree(rule: str, mode: str) -> None:
    torch.manual_seed(0)
    model = Table(sparse=True).double()
    twin = Table(sparse=False).double()
    twin.load_state_dict(model.state_dict())
    opt = aggregator(model, rule, mode=mode)
    other = GradientAggregator(
        torch.optim.SGD(twin.parameters()),
        rule,
        num_strata=S,
        mode=mode,  # type: ignore[arg-type]
    )
    for _ in range(2):  # the second is accumulated
        backward(opt, model)
        backward(other, twin)
        grad = model.items.weight.grad
        assert grad is not None
        assert grad.is_sparse
        dense = twin.items.weight.grad
        assert dense is not None
        # CAGrad is solved to 1e-5: sums in another order move its weights by less than that.
        rtol, atol = (1e-5, 1e-6) if rule == "cagrad" else (1e-10, 1e-14)
        torch.testing.assert_close(grad.to_dense(), dense, rtol=rtol, atol=atol)
        torch.testing.assert_close(
            model.users.weight.grad, twin.users.weight.grad, rtol=rtol, atol=atol
        )
    assert set(grad.coalesce().indices().flatten().tolist()) <= {0, 1, 2, 3, 5, 8, 40}
    assert not grad.to_dense()[0].any()  # padding
    opt.step()  # SparseAdam refuses dense gradients
    touched = ITEMS.unique()
    untouched = torch.ones(NUM_ITEMS, dtype=torch.bool).index_fill(0, touched, False)
    assert torch.equal(model.items.weight[untouched], twin.items.weight[untouched])
    opt.zero_grad()
    assert model.items.weight.grad is None


def test_state_of_both_optimizers_survives_a_copy() -> None:
    torch.manual_seed(0)
    model = Table(sparse=True).double()
    opt = aggregator(model)
    backward(opt, model)
    opt.step()
    twin, other = copy.deepcopy((model, opt))
    for net, wrapped in ((model, opt), (twin, other)):
        wrapped.zero_grad()
        backward(wrapped, net, ITEMS.roll(1, 0))
        wrapped.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
