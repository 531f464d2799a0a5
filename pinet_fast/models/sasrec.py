"""SASRec on ragged batches."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast.aggregation.sharing import rows_alone
from pinet_fast.aggregation.strata_index import repeat_rows
from pinet_fast.errors import ConfigError
from pinet_fast.kernels import ragged_attention
from pinet_fast.models.dropout import Dropout, Masks
from pinet_fast.models.layers import Embedding, LayerNorm, Linear
from pinet_fast.models.sequence import SequenceModel

NormName = Literal["pre", "post"]


class SASRec(SequenceModel):
    """Self-attentive sequential recommendation.

    Deviations from the paper: with ``norm="pre"`` blocks whose norm is on the whole residual
    branch (the paper normalises queries only), one projection for queries, keys and values with
    biases, ragged batches instead of left-padded ones (position 0 is the most recent event of the
    window, so that the event to predict from always has the same position), losses beside the
    paper's binary cross-entropy. ``norm="post"`` is the form of S3-Rec's SASRec: a norm on the
    embeddings, which are not scaled, and after each residual sum, and a feed-forward of width 4 d
    with GELU.

    Args:
        num_items: V; ids run from 1 to V, 0 is padding and stays untrained.
        max_len: Longest window.
        dim: d.
        num_blocks: Transformer blocks.
        num_heads: Attention heads; must divide ``dim``.
        dropout: Dropout on embeddings, attention weights and residual branches.
        loss: ``"ce"``, softmax over the whole catalogue, or one on the batch's sampled negatives:
            ``"bce"``, ``"ss"``, ``"bpr"``, ``"gbce"``. They take negatives of every event, or
            those of a user or of the whole batch with each of its events.
        tied: Whether items are scored by the rows they are read with.
        gbce_t: Calibration of ``"gbce"``.
        norm: ``"pre"`` or ``"post"``.

    Raises:
        ConfigError: Sizes or names out of range.

    Source:
        Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018, arXiv 1808.09781.
    """

    def __init__(
        self,
        num_items: int,
        *,
        max_len: int = 50,
        dim: int = 64,
        num_blocks: int = 2,
        num_heads: int = 1,
        dropout: float = 0.5,
        loss: str = "ce",
        tied: bool = True,
        gbce_t: float = 0.75,
        norm: NormName = "pre",
    ) -> None:
        super().__init__(num_items, max_len=max_len, dim=dim, loss=loss, tied=tied, gbce_t=gbce_t)
        if dim % num_heads:
            raise ConfigError(f"num_heads: {num_heads} does not divide dim {dim}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        if norm not in get_args(NormName):
            raise ConfigError(f"norm: expected 'pre' or 'post', got {norm!r}")
        self.positions = Embedding(max_len, dim)
        self.dropout = Dropout(dropout)
        block = _Block if norm == "pre" else _PostBlock
        self.blocks = nn.ModuleList(block(dim, num_heads) for _ in range(num_blocks))
        self.drops = block.drops
        self.norm = LayerNorm(dim)
        self.is_pre = norm == "pre"
        self.reset_parameters()

    def states(self, items: Tensor, offsets: Tensor) -> Tensor:
        """Return the state after every event.

        Args:
            items: Rows of the item table for all users' windows, [T, d].
            offsets: Row offsets of the users, int64 [B + 1]; no window longer than ``max_len``.

        Returns:
            [T, d].
        """
        with rows_alone():
            lengths = offsets[1:] - offsets[:-1]
            event = torch.arange(len(items), device=items.device)
            from_end = repeat_rows(offsets[1:], lengths) - 1 - event
        positions = self.positions(from_end)
        with rows_alone():
            x = torch.add(positions, items, alpha=self.dim**0.5 if self.is_pre else 1.0)
        x = x if self.is_pre else self.norm(x)
        with rows_alone():
            masks = self.dropout.masks(x, 1 + len(self.blocks) * self.drops)
            x = masks.drop(x, 0)
        for number, block in enumerate(self.blocks):
            x = block(x, offsets, self.max_len, masks, 1 + number * self.drops)
        out: Tensor = self.norm(x) if self.is_pre else x
        return out


class _Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection.

    Attributes:
        drops: How many tensors [T, d] are dropped from, besides attention weights.
    """

    drops = 3

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.feed_norm = LayerNorm(dim)
        self.up = Linear(dim, dim)
        self.down = Linear(dim, dim)

    def forward(self, x: Tensor, offsets: Tensor, max_len: int, masks: Masks, place: int) -> Tensor:
        masks = masks.where(self.training)
        qkv = self.qkv(self.attention_norm(x))
        out = self.out(_attended(qkv, offsets, self.num_heads, masks.rate, max_len))
        with rows_alone():
            x = x + masks.drop(out, place)
        inner = self.up(self.feed_norm(x))
        with rows_alone():
            inner = masks.drop(torch.relu(inner), place + 1)
        out = self.down(inner)
        with rows_alone():
            summed: Tensor = x + masks.drop(out, place + 2)
        return summed


class _PostBlock(nn.Module):
    """Attention and a feed-forward of 4 d, each with a residual connection and a norm after it.

    Attributes:
        drops: As of :class:`_Block`.
    """

    drops = 2

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.attention_norm = LayerNorm(dim)
        self.up = Linear(dim, 4 * dim)
        self.down = Linear(4 * dim, dim)
        self.feed_norm = LayerNorm(dim)

    def forward(self, x: Tensor, offsets: Tensor, max_len: int, masks: Masks, place: int) -> Tensor:
        masks = masks.where(self.training)
        out = self.out(_attended(self.qkv(x), offsets, self.num_heads, masks.rate, max_len))
        with rows_alone():
            x = x + masks.drop(out, place)
        x = self.attention_norm(x)
        inner = self.up(x)
        with rows_alone():
            inner = F.gelu(inner)
        out = self.down(inner)
        with rows_alone():
            x = x + masks.drop(out, place + 1)
        normed: Tensor = self.feed_norm(x)
        return normed


def _attended(qkv: Tensor, offsets: Tensor, num_heads: int, rate: float, max_len: int) -> Tensor:
    """Return what the events attend to, [T, d], for queries, keys and values [T, 3 d]."""
    with rows_alone():
        num_events, width = qkv.shape
        heads = qkv.view(num_events, 3, num_heads, width // (3 * num_heads))
        attended: Tensor = ragged_attention(heads, offsets, dropout=rate, max_len=max_len)
        return attended.flatten(1)
