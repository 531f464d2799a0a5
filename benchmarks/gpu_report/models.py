"""Two models as people write them, with torch alone: padded SASRec, and a tied encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.gpu_report.setting import Setting


@dataclass(frozen=True)
class Size:
    """Sizes of a model and a batch."""

    users: int
    length: int
    dim: int
    items: int
    blocks: int = 2


class Block(nn.Module):
    """Attention and a layer of two, each with its norm before it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before_attention, self.before_inner = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, d]."""
        parts = self.query_key_value(self.before_attention(x)).chunk(3, -1)
        query, key, value = (part.unsqueeze(1) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.squeeze(1))
        return x + self.down(F.gelu(self.up(self.before_inner(x))))


class NextItem(nn.Module):
    """One loss a user and position: BCE with one negative (SASRec), or CE by the tied table.

    The second has a gate on its states too, as a parameter that rows are multiplied by.
    """

    def __init__(self, size: Size, loss: str) -> None:
        super().__init__()
        self.items = nn.Embedding(size.items, size.dim, padding_idx=0)
        self.positions = nn.Embedding(size.length, size.dim)
        self.blocks = nn.ModuleList(Block(size.dim) for _ in range(size.blocks))
        self.last = nn.LayerNorm(size.dim)
        self.gate = nn.Parameter(torch.ones(size.dim)) if loss == "ce" else None

    def forward(self, ids: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """Return losses [B, L]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.items(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        x = self.last(x)
        if self.gate is not None:
            scores = F.linear(x.flatten(0, 1) * self.gate, self.items.weight)
            losses = F.cross_entropy(scores.float(), targets.flatten(), reduction="none")
            return losses.view(ids.shape)
        good = (x * self.items(targets)).sum(-1)
        bad = (x * self.items(negatives)).sum(-1)
        return F.softplus(-good.float()) + F.softplus(bad.float())


@dataclass(frozen=True)
class Batch:
    """Items [B, L] and the stratum of every user [B]."""

    ids: Tensor
    targets: Tensor
    negatives: Tensor
    strata: Tensor

    def of(self, users: Tensor) -> Batch:
        """Return the batch of some users."""
        return Batch(*(x[users] for x in (self.ids, self.targets, self.negatives, self.strata)))


def make_batch(size: Size, num_strata: int, setting: Setting, seed: int) -> Batch:
    """Return a batch whose users come in any order of strata."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, size.users, size.length)
    ids = torch.randint(1, size.items, shape, generator=generator)
    strata = torch.arange(size.users) % num_strata
    strata = strata[torch.randperm(size.users, generator=generator)]
    return Batch(*ids.to(setting.device), strata.to(setting.device))


def make_model(size: Size, loss: str, setting: Setting) -> NextItem:
    """Return the same model every time, no parameter of it zero or one."""
    torch.manual_seed(0)
    model = NextItem(size, loss)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(setting.device)
