"""GRU4Rec with in-batch negatives: every user's loss sees the others' items, so exact mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast import GradientAggregator

NUM_ITEMS, LENGTH = 30, 8


class GRU4Rec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, 16)
        self.gru = nn.GRU(16, 16, batch_first=True)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        states = self.gru(self.items(ids))[0][:, -1]
        return states @ self.items(targets).T  # [B, B]: the others' targets are the negatives


def test_script_learns_with_bpr() -> None:
    torch.manual_seed(0)
    model = GRU4Rec()
    opt = GradientAggregator(  # 1
        torch.optim.Adam(model.parameters(), lr=0.01), "balanced", mode="exact"
    )
    losses_seen = []
    for _ in range(60):
        strata = torch.randint(0, 3, (16,))
        rows = (
            torch.randint(1, 8, (16, 1)) + torch.arange(LENGTH + 1) * (1 + strata[:, None])
        ) % 30
        ids, targets = rows[:, :-1] + 1, rows[:, -1] + 1
        opt.zero_grad()
        with opt.stratify(strata, num_strata=3):  # 2
            scores = model(ids, targets)
            own = scores.diagonal().unsqueeze(1)
            same = targets.unsqueeze(0) == targets.unsqueeze(1)
            losses = F.softplus(scores - own).masked_fill(same, 0.0).mean(1)
        opt.backward(losses)  # 3
        opt.step()
        losses_seen.append(float(losses.detach().mean()))
    assert sum(losses_seen[-5:]) < 0.6 * sum(losses_seen[:5])
    assert opt.report.mode == "exact"
