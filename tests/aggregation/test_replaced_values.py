"""``p.data = ...`` inside ``stratify``: the forward and the gradients are of the new values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pinet_fast.aggregation import GradientAggregator

STRATA = [0, 1, 1, 0, 1, 0, 0]
IDS = torch.tensor([1, 2, 0, 3, 3, 1, 2])


@pytest.mark.parametrize("lane", ["0", "1"])
def test_a_forward_takes_the_values_of_its_time(monkeypatch: pytest.MonkeyPatch, lane: str) -> None:
    monkeypatch.setenv("PINET_FAST_LANE", lane)
    table, norm, layer = nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)
    model = nn.ModuleList([table, norm, layer])
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.0), "mgda")
    for step in range(6):  # the sites are settled after two
        drawn = [torch.randn_like(p) for p in model.parameters()]
        opt.zero_grad()
        with opt.stratify(STRATA):
            for p, values in zip(model.parameters(), drawn, strict=True):
                p.data = values.clone()
            out = layer(norm(table(IDS)))
        rows, scale, shift, weight, bias = (values.requires_grad_() for values in drawn)
        expected = F.linear(F.layer_norm(rows[IDS], (3,), scale, shift), weight, bias)
        assert torch.equal(out, expected), step
        opt.backward(out.sin().sum(1))
        weights = opt.report.weights
        assert weights is not None
        losses, groups = expected.sin().sum(1), torch.tensor(STRATA)
        total = sum(w * losses[groups == s].mean() for s, w in enumerate(weights.float()))
        assert isinstance(total, torch.Tensor)
        for p, grad in zip(model.parameters(), torch.autograd.grad(total, drawn), strict=True):
            torch.testing.assert_close(p.grad, grad)
        opt.step()


def test_padding_that_torch_refuses_is_refused_inside() -> None:
    table = nn.Parameter(torch.randn(4, 3))
    opt = GradientAggregator(torch.optim.SGD([table], lr=0.1), "agreement")
    for padding in (4, -5):
        with pytest.raises(AssertionError, match="adding_idx must be within num_embeddings"):
            F.embedding(IDS, table, padding_idx=padding)
        with (
            pytest.raises(AssertionError, match="adding_idx must be within num_embeddings"),
            opt.stratify(STRATA),
        ):
            F.embedding(IDS, table, padding_idx=padding)
