"""Cost of an aggregated step over a plain one for models other than SASRec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast import GradientAggregator

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_ITEMS, DIM, USERS, LENGTH = 3416, 64, 128, 50


class TiedEncoder(nn.Module):
    """nn.TransformerEncoder whose item table is its output layer, full softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS, DIM)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, DIM))
        layer = nn.TransformerEncoderLayer(
            DIM, 2, 4 * DIM, dropout=0.2, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, items: Tensor, targets: Tensor) -> Tensor:
        """Return one loss a user: its last event's cross-entropy."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        x = self.encoder(self.items(items) + self.positions, mask=mask, is_causal=True)
        return F.cross_entropy(x[:, -1] @ self.items.weight.T, targets[:, -1], reduction="none")


class GRU4Rec(nn.Module):
    """A GRU over the items, BPR against one negative an event."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS, DIM)
        self.gru = nn.GRU(DIM, DIM, batch_first=True)

    def forward(self, items: Tensor, targets: Tensor) -> Tensor:
        """Return one loss a user, the mean over its events."""
        x = self.gru(self.items(items))[0]
        negatives = targets.flip(0)
        margin = (x * (self.items(targets) - self.items(negatives))).sum(-1)
        return -F.logsigmoid(margin).mean(1)


class DIN(nn.Module):
    """Attention of the candidate over the history, then an MLP; binary cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS, DIM)
        self.attention = nn.Sequential(nn.Linear(4 * DIM, 36), nn.PReLU(), nn.Linear(36, 1))
        self.mlp = nn.Sequential(nn.Linear(2 * DIM, 80), nn.PReLU(), nn.Linear(80, 1))

    def forward(self, items: Tensor, targets: Tensor) -> Tensor:
        """Return one loss a user."""
        history, candidate = self.items(items), self.items(targets[:, -1])
        each = candidate.unsqueeze(1).expand_as(history)
        pair = torch.cat([history, each, history - each, history * each], dim=-1)
        interest = (self.attention(pair) * history).sum(1)
        logits = self.mlp(torch.cat([interest, candidate], dim=-1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(
            logits, (targets[:, 0] % 2).to(logits), reduction="none"
        )


@pytest.mark.parametrize("num_strata", [4, 8])
@pytest.mark.parametrize("make", [TiedEncoder, GRU4Rec, DIN])
def test_step_of_a_model(
    make: type[nn.Module], num_strata: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "models"
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(NUM_ITEMS, (2, USERS, LENGTH), generator=generator)
    strata = torch.arange(USERS) * num_strata // USERS

    def trained() -> nn.Module:
        torch.manual_seed(0)
        return make()

    plain_model, model = trained(), trained()
    plain_opt = torch.optim.Adam(plain_model.parameters())
    opt = GradientAggregator(torch.optim.Adam(model.parameters()), "balanced")

    def plain() -> None:
        plain_opt.zero_grad()
        plain_model(*data).mean().backward()
        plain_opt.step()

    def aggregated() -> None:
        opt.zero_grad()
        with opt.stratify(strata):
            losses = model(*data)
        opt.backward(losses)
        opt.step()

    # The step that is timed must be right: its gradient is the weighted sum of separate ones.
    check, twin = trained().eval(), trained().eval()
    checked = GradientAggregator(torch.optim.Adam(check.parameters()), "balanced")
    with checked.stratify(strata):
        losses = check(*data)
    checked.backward(losses)
    weights = checked.report.weights
    assert weights is not None
    losses = twin(*data)
    means = torch.stack([losses[strata == s].mean() for s in range(num_strata)])
    means.backward(weights.to(means.dtype))
    scale = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    for p, q in zip(check.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert float((p.grad - q.grad).abs().max()) <= 1e-4 * scale

    result = paired(aggregated, plain, rounds=30)
    assert result.ratio > 0
    assert opt.report.leak == "proven"
