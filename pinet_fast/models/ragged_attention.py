"""Causal attention over ragged sequences, padded only inside small buckets of equal length.

Users are bucketed by length (powers of two). Inside a bucket sequences are padded on the right, so
that the causal mask alone keeps valid queries from padded keys; everything else in a model runs on
the T events without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.strata_index import repeat_rows

_SMALLEST_BUCKET = 8


@dataclass(frozen=True)
class AttentionPlan:
    """Where every event goes for attention; computed once a batch, used by every block.

    Attributes:
        order: Events sorted by bucket, int64 [T].
        inverse: Position of every event in ``order``, int64 [T].
        buckets: For each bucket: its users, its padded length, its events and their cells in the
            padded [users * length] layout.
    """

    order: Tensor
    inverse: Tensor
    buckets: tuple[tuple[int, int, int, Tensor], ...]

    @classmethod
    def from_offsets(cls, offsets: Tensor) -> AttentionPlan:
        """Plan the attention of B users; ``offsets`` int64 [B + 1]."""
        device = offsets.device
        offsets = offsets.cpu()
        lengths = offsets[1:] - offsets[:-1]
        sizes = lengths.clamp_min(_SMALLEST_BUCKET).double().log2().ceil().exp2().long()
        user = repeat_rows(torch.arange(len(lengths)), lengths)
        order = torch.argsort(sizes[user], stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        column = torch.arange(len(order)) - offsets[user]
        buckets = []
        for size in torch.unique(sizes[lengths > 0]).tolist():
            members = (sizes == size) & (lengths > 0)
            row = torch.cumsum(members, 0) - 1
            events = order[sizes[user[order]] == size]
            width = int(lengths[members].max())
            cells = row[user[events]] * width + column[events]
            buckets.append((int(members.sum()), width, len(events), cells.to(device)))
        return cls(order.to(device), inverse.to(device), tuple(buckets))


def ragged_attention(qkv: Tensor, plan: AttentionPlan, dropout: float = 0.0) -> Tensor:
    """Return causal softmax attention of every event over its user's events so far.

    Args:
        qkv: Queries, keys and values, [T, 3, H, d_head].
        plan: The batch's plan.
        dropout: Probability of dropping an attention weight.

    Returns:
        [T, H, d_head].
    """
    num_events, _, heads, width = qkv.shape
    outputs = []
    start = 0
    ordered = qkv.index_select(0, plan.order)
    for users, length, events, cells in plan.buckets:
        part = ordered[start : start + events]
        start += events
        padded = qkv.new_zeros((users * length, 3, heads, width)).index_copy(0, cells, part)
        q, k, v = padded.view(users, length, 3, heads, width).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        rows = out.transpose(1, 2).reshape(users * length, heads, width)
        outputs.append(rows.index_select(0, cells))
    if not outputs:
        return qkv.new_zeros((num_events, heads, width))
    return torch.cat(outputs).index_select(0, plan.inverse)
