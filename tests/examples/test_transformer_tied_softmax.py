"""A training script as people write it, made deconfounded by three lines (marked)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast import GradientAggregator

NUM_ITEMS, LENGTH, DIM = 60, 12, 16


class NextItem(nn.Module):
    """nn.TransformerEncoder, padded batches, tied softmax by `h @ E.weight.T`."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, DIM, padding_idx=0)
        self.positions = nn.Parameter(torch.zeros(1, LENGTH, DIM))
        layer = nn.TransformerEncoderLayer(DIM, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.items(ids) + self.positions
        hidden = self.encoder(x, mask=causal, is_causal=True)
        return hidden @ self.items.weight.T


def batches(num: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sequences that count upwards, by 1 for tail users and by 2 for head users; left-padded."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(num):
        strata = (torch.rand(32, generator=generator) < 0.2).long()
        start = torch.randint(1, 20, (32, 1), generator=generator)
        steps = torch.arange(LENGTH + 1) * (1 + strata[:, None])
        rows = start + steps
        shortest = torch.where(strata == 0, LENGTH // 2, 0)
        rows[torch.arange(LENGTH + 1) < shortest[:, None]] = 0
        out.append((rows[:, :-1], rows[:, 1:], strata))
    return out


def test_script_learns_both_strata() -> None:
    torch.manual_seed(0)
    model = NextItem()
    opt = GradientAggregator(torch.optim.Adam(model.parameters(), lr=3e-3), "agreement")  # 1
    history = []
    for ids, targets, strata in batches(60):
        opt.zero_grad()
        with opt.stratify(strata, num_strata=2):  # 2
            logits = model(ids)
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        opt.backward(losses, weights=(targets > 0).float())  # 3
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        opt.step()
        history.append(opt.report.losses)
    first, last = history[0], history[-1]
    assert first is not None
    assert last is not None
    assert (last < 0.6 * first).all()
    assert opt.report.leak == "proven"
