"""Small ragged batches for models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.aggregation import StrataIndex
from pinet_fast.data import RaggedBatch

if TYPE_CHECKING:
    from collections.abc import Sequence


def ragged_batch(
    strata: Sequence[int],
    lengths: Sequence[int],
    *,
    num_strata: int,
    num_items: int,
    num_negatives: int = 1,
    seed: int = 0,
) -> RaggedBatch:
    """Return a batch of random events for users of the given strata and lengths."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(list(lengths), dtype=torch.int64)
    num_events = int(size.sum())

    def items(*shape: int) -> torch.Tensor:
        return torch.randint(1, num_items + 1, shape, generator=generator)

    return RaggedBatch(
        values=items(num_events),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), size.cumsum(0)]),
        strata=StrataIndex(torch.tensor(list(strata), dtype=torch.int64), num_strata, size),
        users=torch.arange(len(size)),
        targets=items(num_events),
        negatives=items(num_events, num_negatives),
        max_len=max(lengths, default=0),
    )
