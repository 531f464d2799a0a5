"""SASRec as the well-known PyTorch port writes it: time-major, LayerNorm on [L, B, d]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast import GradientAggregator

NUM_ITEMS, LENGTH, DIM = 40, 10, 16


class TimeMajorSASRec(nn.Module):
    """Left-padded [B, L] ids; attention over [L, B, d]; BCE with one negative."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, DIM, padding_idx=0)
        self.positions = nn.Embedding(LENGTH + 1, DIM, padding_idx=0)
        self.dropout = nn.Dropout(0.1)
        self.attention_norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(DIM, 2, 0.1) for _ in range(2))
        self.feed_norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv1d(DIM, DIM, 1) for _ in range(4))
        self.last_norm = nn.LayerNorm(DIM)

    def states(self, ids: Tensor) -> Tensor:
        x = self.items(ids) * DIM**0.5
        places = torch.arange(1, LENGTH + 1).expand(ids.shape) * (ids != 0)
        x = self.dropout(x + self.positions(places))
        causal = ~torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool))
        for i in range(2):
            x = x.transpose(0, 1)
            query = self.attention_norms[i](x)
            x = query + self.attentions[i](query, x, x, attn_mask=causal)[0]
            x = x.transpose(0, 1)
            y = self.feed_norms[i](x)
            inner = torch.relu(self.convs[2 * i](y.transpose(-1, -2)))
            x = y + self.dropout(self.convs[2 * i + 1](inner)).transpose(-1, -2)
        return self.last_norm(x)

    def forward(self, ids: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        states = self.states(ids)
        return (
            (states * self.items(positives)).sum(-1),
            (states * self.items(negatives)).sum(-1),
        )


def test_script_learns_and_every_boundary_is_proven() -> None:
    torch.manual_seed(0)
    model = TimeMajorSASRec()
    opt = GradientAggregator(torch.optim.Adam(model.parameters(), lr=3e-3), "mgda")  # 1
    before = after = None
    for step in range(60):
        strata = (torch.rand(24) < 0.25).long()
        rows = torch.randint(1, 15, (24, 1)) + torch.arange(LENGTH + 1) * (1 + strata[:, None])
        rows[torch.arange(LENGTH + 1) < torch.where(strata == 0, 5, 0)[:, None]] = 0
        ids, positives = rows[:, :-1], rows[:, 1:]
        negatives = torch.randint(1, NUM_ITEMS + 1, positives.shape)
        opt.zero_grad()
        with opt.stratify(strata, num_strata=2):  # 2
            positive, negative = model(ids, positives, negatives)
            losses = F.softplus(-positive) + F.softplus(negative)
        opt.backward(losses, weights=(positives != 0).float())  # 3
        opt.step()
        before, after = (opt.report.losses, after) if step == 0 else (before, opt.report.losses)
    assert before is not None
    assert after is not None
    assert (after < 0.8 * before).all()
    assert opt.report.leak == "proven"
