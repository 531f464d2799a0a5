"""Ragged attention relative to torch's padded one, forward and backward."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from pinet_fast.kernels import ragged_attention

if TYPE_CHECKING:
    from collections.abc import Callable

USERS, LENGTH = 128, 50
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def real_data() -> Path:
    """Return the folder of public logs, or skip."""
    folder = Path(os.environ.get("PINET_FAST_DATA", DATA))
    if not folder.is_dir():
        pytest.skip(f"no public logs at {folder}; PINET_FAST_DATA names their folder")
    return folder


def padded_qkv(qkv: torch.Tensor, lengths: torch.Tensor, width: int) -> list[torch.Tensor]:
    """Return queries, keys and values [B, H, width, D], contiguous leaves, users from the left."""
    _, _, heads, dim = qkv.shape
    cells = torch.arange(width) < lengths.unsqueeze(1)
    padded = torch.zeros(len(lengths), width, 3, heads, dim)
    padded[cells] = qkv.detach()
    return [t.contiguous().requires_grad_() for t in padded.permute(2, 0, 3, 1, 4)]


def compare(
    lengths: torch.Tensor,
    width: int,
    heads: int,
    dim: int,
    dropout: float,
    paired: Callable[..., Any],
    rounds: int = 40,
) -> Any:
    """Time both on the same values; the padded side gets its padding and layout for free."""
    torch.manual_seed(0)
    events = int(lengths.sum())
    qkv = torch.randn(events, 3, heads, dim, requires_grad=True)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    grad = torch.randn(events, heads, dim)
    q, k, v = padded_qkv(qkv, lengths, width)
    cells = torch.arange(width) < lengths.unsqueeze(1)
    padded_grad = torch.zeros(len(lengths), width, heads, dim)
    padded_grad[cells] = grad
    padded_grad = padded_grad.transpose(1, 2).contiguous()

    def ours() -> Any:
        out = ragged_attention(qkv, offsets, dropout=dropout, max_len=width)
        return out, torch.autograd.grad(out, qkv, grad)[0]

    def theirs() -> Any:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return out, torch.autograd.grad(out, (q, k, v), padded_grad)

    if dropout == 0.0:
        out, gradient = ours()
        right, gradients = theirs()
        torch.testing.assert_close(out, right.transpose(1, 2)[cells], rtol=1e-4, atol=1e-5)
        stacked = torch.stack([g.transpose(1, 2)[cells] for g in gradients], 1)
        torch.testing.assert_close(gradient, stacked, rtol=1e-3, atol=1e-4)
    return paired(ours, theirs, rounds=rounds)


def beauty_lengths(folder: Path) -> torch.Tensor:
    """Return the training events of 128 users, at most 50: all but each one's last two."""
    users = pq.read_table(folder / "amazon-beauty-5core.parquet", columns=["user"])["user"]
    _, counts = np.unique(users.to_numpy(), return_counts=True)
    chosen = np.random.default_rng(0).choice(counts, USERS, replace=False)
    return torch.from_numpy(np.clip(chosen - 2, 1, LENGTH)).long()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("heads", [1, 2])
def test_lengths_of_beauty_over_padded(
    heads: int, dropout: float, real_data: Path, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "attention"
    compare(beauty_lengths(real_data), LENGTH, heads, 64 // heads, dropout, paired)


@pytest.mark.parametrize(
    ("users", "length", "heads", "dim"),
    [
        (128, 10, 1, 64), (128, 20, 1, 64), (128, 50, 1, 64), (128, 50, 2, 32), (128, 50, 4, 16),
        (32, 200, 1, 64), (32, 200, 1, 128), (8, 512, 2, 64), (1, 4096, 1, 64),
    ],
)  # fmt: skip
def test_equal_lengths_over_padded(
    users: int, length: int, heads: int, dim: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "attention"
    lengths = torch.full((users,), length)
    compare(lengths, length, heads, dim, 0.0, paired, rounds=40 if length < 1000 else 8)
