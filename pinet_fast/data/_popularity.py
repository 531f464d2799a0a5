"""Weights of items by their popularity, ready to draw from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pinet_fast.data import _njit_negatives

if TYPE_CHECKING:
    from pinet_fast.data.splits import Split
    from pinet_fast.data.store import SequenceStore

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Popularity:
    """Weights of the items as an alias table and as running sums.

    Attributes:
        cumulative: Weight of items 1..v, float64 [V + 1].
        keep: Share of column v - 1 that is item v, float64 [V].
        alias: Column of the rest, int64 [V].
    """

    cumulative: FloatArray
    keep: FloatArray
    alias: IntArray

    @classmethod
    def of(cls, weights: FloatArray) -> Popularity:
        """Build both from the weights of items 1..V, float64 [V], all above 0."""
        weights = weights / weights.sum()
        keep, alias = np.empty(len(weights)), np.empty(len(weights), np.int64)
        _njit_negatives.alias_table(weights, keep, alias)
        return cls(np.concatenate(([0.0], np.cumsum(weights))), keep, alias)

    @classmethod
    def of_training_events(cls, store: SequenceStore, split: Split, alpha: float) -> Popularity:
        """Weigh items by (training events)^alpha; an item without any counts as if it had one."""
        counts = training_counts(store, split)
        log_weights = alpha * np.log(np.maximum(counts[1:], 1))
        return cls.of(np.exp(log_weights - log_weights.max()))


def training_counts(store: SequenceStore, split: Split) -> IntArray:
    """Return the training events of every item, int64 [V + 1]; item 0 has none."""
    counts = np.zeros(store.num_items + 1, np.int64)
    _njit_negatives.count_items(store.items, store.offsets[:-1], split.train_ends(store), counts)
    return counts
