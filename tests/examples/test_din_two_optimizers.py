"""DIN with BCE as people write it: sparse tables, an EmbeddingBag, Adam and SparseAdam."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast import GradientAggregator

NUM_ITEMS, NUM_TAGS, LENGTH, DIM, BATCH = 40, 10, 12, 8, 32


class DIN(nn.Module):
    """Click probability of a target item given padded behaviours [B, L] and bags of tags."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, DIM, padding_idx=0, sparse=True)
        self.tags = nn.EmbeddingBag(NUM_TAGS, DIM, mode="mean", sparse=True)
        self.attention = nn.Sequential(nn.Linear(4 * DIM, 16), nn.PReLU(), nn.Linear(16, 1))
        self.head = nn.Sequential(nn.Linear(3 * DIM, 16), nn.PReLU(), nn.Linear(16, 1))

    def forward(self, history: Tensor, target: Tensor, tags: Tensor, offsets: Tensor) -> Tensor:
        behaviours = self.items(history)
        query = self.items(target).unsqueeze(1).expand_as(behaviours)
        parts = [query, behaviours, query - behaviours, query * behaviours]
        scores = self.attention(torch.cat(parts, dim=-1)).squeeze(-1)
        scores = scores.masked_fill(history == 0, 0.0)
        interest = (scores.unsqueeze(1) @ behaviours).squeeze(1)
        user = self.tags(tags, offsets)
        return self.head(torch.cat([interest, self.items(target), user], dim=-1)).squeeze(-1)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Users like odd or even items; head users (stratum 1) have longer histories and more tags."""
    strata = (torch.rand(BATCH) < 0.3).long()
    taste = torch.randint(0, 2, (BATCH, 1))
    history = 2 * torch.randint(0, NUM_ITEMS // 2, (BATCH, LENGTH)) + taste + 1
    lengths = torch.where(strata == 1, LENGTH, torch.randint(2, 5, (BATCH,)))
    history[torch.arange(LENGTH) >= lengths[:, None]] = 0
    target = torch.randint(1, NUM_ITEMS + 1, (BATCH,))
    clicks = ((target - 1) % 2 == taste[:, 0]).float()
    sizes = 1 + 2 * strata
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
    tags = torch.randint(0, NUM_TAGS, (int(sizes.sum()),))
    return history, target, tags, offsets, clicks, strata


def test_script_learns_with_two_optimizers() -> None:
    torch.manual_seed(0)
    model = DIN()
    tables = [model.items.weight, model.tags.weight]
    others = [*model.attention.parameters(), *model.head.parameters()]
    optimizers = [torch.optim.Adam(others, lr=0.01), torch.optim.SparseAdam(tables, lr=0.02)]
    opt = GradientAggregator(optimizers, "agreement")  # 1
    seen = []
    for _ in range(120):
        history, target, tags, offsets, clicks, strata = batch()
        opt.zero_grad()
        with opt.stratify(strata, num_strata=2):  # 2
            logits = model(history, target, tags, offsets)
            losses = F.binary_cross_entropy_with_logits(logits, clicks, reduction="none")
        opt.backward(losses)  # 3
        assert all(table.grad is not None and table.grad.is_sparse for table in tables)
        opt.step()
        seen.append(opt.report.losses)
    first, last = (
        torch.stack([x for x in part if x is not None]).mean(0) for part in (seen[:10], seen[-10:])
    )
    assert (last < 0.6 * first).all()
    assert opt.report.leak == "proven"
    assert opt.report.mode == "one-pass"
