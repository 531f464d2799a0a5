"""``python -m benchmarks.published.padded``: S3-Rec's SASRec, with nothing of this library.

Where a run of the library is below a published figure, this tells whether the library or the recipe
is: padded sequences, plain PyTorch, negatives, evaluation and stop as S3-Rec's published code has
them (github.com/aHuiWang/CIKM2020-S3Rec), written here from its description. Full ranking, once
with the history at score 0 as there and once without it, and against 99 uniform negatives.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH, DIM, HEADS, RATE, BATCH = 50, 64, 2, 0.5, 256


class Block(nn.Module):
    """Attention and a feed-forward of 4 d, a norm after each residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return [B, L, d] for [B, L, d] and an additive mask [B, 1, L, L]."""
        q, k, v = (
            layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / (DIM // HEADS) ** 0.5 + mask, -1)
        mixed = (F.dropout(weights, RATE, self.training) @ v).transpose(1, 2).flatten(2)
        x = self.norms[0](x + F.dropout(self.out(mixed), RATE, self.training))
        inner = self.down(F.gelu(self.up(x)))
        return self.norms[1](x + F.dropout(inner, RATE, self.training))


class SASRec(nn.Module):
    """Left-padded SASRec; item 0 is padding."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items + 2, DIM, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, DIM)
        self.norm = nn.LayerNorm(DIM, eps=1e-12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, items: Tensor) -> Tensor:
        """Return states [B, L, d] of items [B, L], whose last column is the latest event."""
        width = items.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        mask = (causal & (items > 0)[:, None, None]).float().sub(1).mul(10000.0)
        x = self.norm(self.items(items) + self.positions.weight[LENGTH - width :])
        x = F.dropout(x, RATE, self.training)
        for block in self.blocks:
            x = block(x, mask)
        return x


def padded(rows: list[np.ndarray]) -> Tensor:
    """Return the rows at the right of [B, width], zeros at their left."""
    width = max(len(row) for row in rows)
    out = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        out[i, width - len(row) :] = row
    return torch.from_numpy(out)


def train_epoch(
    model: SASRec,
    optimizer: torch.optim.Optimizer,
    sequences: list[np.ndarray],
    known: list[np.ndarray],
    num_items: int,
    rng: np.random.Generator,
) -> float:
    """Train on all users once; return the mean loss of the batches."""
    model.train()
    losses = []
    order = rng.permutation(len(sequences))
    for start in range(0, len(order), BATCH):
        users = order[start : start + BATCH]
        inputs = [sequences[u][:-3][-LENGTH:] for u in users]
        targets = padded([sequences[u][1:-2][-LENGTH:] for u in users])
        drawn = []
        for u, row in zip(users, inputs, strict=True):
            items = rng.integers(1, num_items + 2, len(row))
            while (taken := np.isin(items, known[u])).any():
                items[taken] = rng.integers(1, num_items + 2, int(taken.sum()))
            drawn.append(items)
        hidden = model(padded(inputs))
        positive = (hidden * model.items(targets)).sum(-1)
        negative = (hidden * model.items(padded(drawn))).sum(-1)
        is_target = targets > 0
        each = F.softplus(-positive) + F.softplus(negative)
        loss = (each * is_target).sum() / is_target.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


@torch.no_grad()
def evaluate(
    model: SASRec, sequences: list[np.ndarray], held_out: int, num_items: int
) -> dict[str, float]:
    """Return NDCG and HR of the event ``held_out`` from the end, from those before it."""
    model.eval()
    rng = np.random.default_rng(12345)
    ranks: dict[str, list[np.ndarray]] = {"full": [], "zeroed": [], "sampled": []}
    for start in range(0, len(sequences), BATCH):
        rows = sequences[start : start + BATCH]
        before = [row[:-held_out] for row in rows]
        target = torch.tensor([int(row[-held_out]) for row in rows])
        scores = model(padded([row[-LENGTH:] for row in before]))[:, -1] @ model.items.weight.T
        own = scores.gather(1, target[:, None])
        place = np.repeat(np.arange(len(rows)), [len(row) for row in before])
        seen = (torch.from_numpy(place), torch.from_numpy(np.concatenate(before)))
        negatives = rng.integers(1, num_items + 1, (len(rows), 99))
        for i, row in enumerate(rows):
            while (taken := np.isin(negatives[i], row)).any():
                negatives[i, taken] = rng.integers(1, num_items + 1, int(taken.sum()))
        against = scores.gather(1, torch.from_numpy(negatives))
        ranks["sampled"].append((against > own).sum(1).numpy())
        scores[seen] = 0.0
        ranks["zeroed"].append((scores > own).sum(1).numpy())
        scores[seen] = -torch.inf
        scores[:, 0] = -torch.inf
        scores[:, num_items + 1] = -torch.inf
        ranks["full"].append((scores > own).sum(1).numpy())
    found = {}
    for name, parts in ranks.items():
        rank = np.concatenate(parts)
        for k in (10, 20):
            found[f"{name} ndcg@{k}"] = float(np.where(rank < k, 1 / np.log2(rank + 2.0), 0).mean())
        found[f"{name} hr@10"] = float((rank < 10).mean())
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.published.padded", description=__doc__)
    parser.add_argument("data", type=Path, help="a Parquet log, rows by user and in order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--patience", type=int, default=10, help="epochs without a better NDCG@20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the metrics as JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    rng = np.random.default_rng(given.seed)
    table = pq.read_table(given.data, columns=["user", "item"])
    users, items = table["user"].to_numpy(), table["item"].to_numpy().astype(np.int64)
    sequences = np.split(items, np.flatnonzero(np.diff(users)) + 1)
    known = [np.unique(row) for row in sequences]
    num_items = int(items.max())
    model = SASRec(num_items)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    best, best_epoch, state = -1.0, -1, copy.deepcopy(model.state_dict())
    for epoch in range(given.epochs):
        began = time.perf_counter()
        loss = train_epoch(model, optimizer, sequences, known, num_items, rng)
        valid = evaluate(model, sequences, 2, num_items)
        if valid["zeroed ndcg@20"] > best:
            best, best_epoch = valid["zeroed ndcg@20"], epoch
            state = copy.deepcopy(model.state_dict())
        seconds = time.perf_counter() - began
        print(
            f"epoch {epoch}: loss {loss:.4f}, valid NDCG@10 {valid['full ndcg@10']:.4f}, sampled "
            f"{valid['sampled ndcg@10']:.4f}, {seconds:.0f} s", flush=True
        )  # fmt: skip
        if epoch - best_epoch >= given.patience:
            break
    model.load_state_dict(state)
    found = {
        "seed": given.seed,
        "best_epoch": best_epoch,
        **evaluate(model, sequences, 1, num_items),
    }
    print(json.dumps(found, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
