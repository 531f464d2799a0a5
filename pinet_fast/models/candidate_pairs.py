"""Pairs of a candidate's row and an event of its history, laid out without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pinet_fast.aggregation.strata_index import repeat_rows


@dataclass(frozen=True)
class CandidatePairs:
    """P pairs: every row of candidates with every event before it, row after row.

    Attributes:
        row: Row of candidates of every pair, int64 [P].
        event: Event of every pair, int64 [P].
        counts: Events of every row's history, int64 [N].
    """

    row: Tensor
    event: Tensor
    counts: Tensor

    @classmethod
    def of(cls, offsets: Tensor, *, per_user: bool) -> CandidatePairs:
        """Pair rows of candidates with the events that they look back on.

        Args:
            offsets: Row offsets of the users' events, int64 [B + 1].
            per_user: A row a user, with all of its events; or a row an event, with those of its
                user up to and with itself.
        """
        starts, ends = offsets[:-1], offsets[1:]
        if not per_user:
            starts = repeat_rows(starts, ends - starts)
            ends = torch.arange(1, len(starts) + 1, device=offsets.device)
        counts = ends - starts
        row = repeat_rows(torch.arange(len(counts), device=offsets.device), counts)
        first = torch.cumsum(counts, 0) - counts
        place = torch.arange(len(row), device=offsets.device) - first[row]
        return cls(row, starts[row] + place, counts)

    def total(self, weights: Tensor, events: Tensor) -> Tensor:
        """Return the weighted sum of each row's history, [N, K, d].

        Args:
            weights: [P, K, 1].
            events: [T, d].
        """
        shape = (len(self.counts), weights.shape[1], events.shape[1])
        parts = weights * events[self.event].unsqueeze(1)
        return parts.new_zeros(shape).index_add(0, self.row, parts)

    def mean(self, events: Tensor) -> Tensor:
        """Return the mean of each row's history, [N, d]; zeros where it is empty."""
        sums = events.new_zeros((len(self.counts), events.shape[1]))
        sums = sums.index_add(0, self.row, events[self.event])
        return sums / self.counts.clamp_min(1).unsqueeze(1)
