"""SASRec on ragged batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast.aggregation.strata_index import repeat_rows
from pinet_fast.errors import ConfigError
from pinet_fast.kernels import ragged_attention
from pinet_fast.models.dropout import Dropout

if TYPE_CHECKING:
    from pinet_fast.data.batch import RaggedBatch

LossName = Literal["ce", "bce"]


class SASRec(nn.Module):
    """Self-attentive sequential recommendation with a tied item table.

    Deviations from the paper: pre-norm blocks with the norm on the whole residual branch (the
    paper normalises queries only), one projection for queries, keys and values with biases, ragged
    batches instead of left-padded ones (position 0 is the most recent event of the window, so that
    the event to predict from always has the same position), full cross-entropy beside the paper's
    binary cross-entropy.

    Args:
        num_items: V; ids run from 1 to V, 0 is padding and stays untrained.
        max_len: Longest window.
        dim: d.
        num_blocks: Transformer blocks.
        num_heads: Attention heads; must divide ``dim``.
        dropout: Dropout on embeddings, attention weights and residual branches.
        loss: ``"ce"``, softmax over the whole catalogue, or ``"bce"``, binary cross-entropy with
            the batch's sampled negatives: those of every event, or those of a user or of the whole
            batch with each of its events.

    Raises:
        ConfigError: Sizes or names out of range.

    Source:
        Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018, arXiv 1808.09781.
    """

    padding_bias: Tensor

    def __init__(
        self,
        num_items: int,
        *,
        max_len: int = 50,
        dim: int = 64,
        num_blocks: int = 2,
        num_heads: int = 1,
        dropout: float = 0.5,
        loss: LossName = "ce",
    ) -> None:
        super().__init__()
        if loss not in get_args(LossName):
            raise ConfigError(f"loss: expected one of {get_args(LossName)}, got {loss!r}")
        if dim % num_heads:
            raise ConfigError(f"num_heads: {num_heads} does not divide dim {dim}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        self.num_items = num_items
        self.max_len = max_len
        self.dim = dim
        self.loss = loss
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(max_len, dim)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(dim, num_heads, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(dim)
        # -inf for item 0 as a bias costs no pass over the [T, V + 1] logits of its own, and leaves
        # exactly zero gradient in the padding row.
        bias = torch.zeros(num_items + 1)
        bias[0] = -torch.inf
        self.register_buffer("padding_bias", bias, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: N(0, 0.02) for tables and matrices, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        with torch.no_grad():
            self.items.weight[0].zero_()

    def hidden(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Return the state after every event.

        Args:
            values: Item ids of all users' windows, int64 [T].
            offsets: Row offsets of the users, int64 [B + 1]; no window longer than ``max_len``.

        Returns:
            [T, d].
        """
        lengths = offsets[1:] - offsets[:-1]
        event = torch.arange(values.numel(), device=values.device)
        from_end = repeat_rows(offsets[1:], lengths) - 1 - event
        x = self.items(values) * self.dim**0.5 + self.positions(from_end)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, offsets, self.max_len)
        out: Tensor = self.norm(x)
        return out

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores of the whole catalogue, [N, V + 1], for states [N, d]; padding -inf."""
        return F.linear(hidden, self.items.weight, self.padding_bias)

    def event_losses(self, hidden: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the loss of every event, [T], from its state [T, d].

        Raises:
            ConfigError: The batch lacks what the loss needs.
        """
        if batch.targets is None:
            raise ConfigError('SASRec: the loss needs batch.targets; use targets="next"')
        if self.loss == "ce":
            return F.cross_entropy(self.scores(hidden), batch.targets, reduction="none")
        if batch.negatives is None:
            raise ConfigError('SASRec: loss="bce" needs batch.negatives; use negatives=Negatives()')
        # One lookup for the target and its negatives: [T, 1 + n].
        negatives = _by_event(batch.negatives, batch)
        candidates = torch.cat([batch.targets.unsqueeze(1), negatives], dim=1)
        logits = (self.items(candidates) * hidden.unsqueeze(1)).sum(-1)
        return F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).sum(1)

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Return the losses of a batch, one an event, [T]."""
        return self.event_losses(self.hidden(batch.values, batch.offsets), batch)


def _by_event(negatives: Tensor, batch: RaggedBatch) -> Tensor:
    """Return the negatives of every event, int64 [T, n], from [T, n], [B, n] or [n].

    Ids are repeated, not embeddings: so every looked-up row is one of the batch's events, which is
    what stratum gradients need.
    """
    if negatives.dim() == 1:
        return negatives.expand(batch.num_events, -1)
    if negatives.dim() == 2 and len(negatives) == batch.num_events:
        return negatives
    if negatives.dim() == 2 and len(negatives) == batch.num_users:
        return repeat_rows(negatives, batch.lengths)
    raise ConfigError(
        f"SASRec: expected negatives per event [{batch.num_events}, n], user "
        f"[{batch.num_users}, n] or batch [n], got shape {list(negatives.shape)}"
    )


class _Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.feed_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, dim)
        self.down = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
        num_events, dim = x.shape
        qkv = self.qkv(self.attention_norm(x))
        qkv = qkv.view(num_events, 3, self.num_heads, dim // self.num_heads)
        rate = self.dropout.p if self.training else 0.0
        attended = ragged_attention(qkv, offsets, dropout=rate, max_len=max_len)
        attended = attended.view(num_events, dim)
        x = x + self.dropout(self.out(attended))
        inner = self.dropout(F.relu(self.up(self.feed_norm(x))))
        out: Tensor = x + self.dropout(self.down(inner))
        return out
