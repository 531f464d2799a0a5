"""Describes a store in numbers: sizes, long tails, ties, repeated pairs, strata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pinet_fast.data.store import SequenceStore
    from pinet_fast.data.strata import Strata

IntArray = npt.NDArray[np.int64]

HEAD_SHARE = 0.2
_EVENTS_AT_ONCE = 1 << 22


def summary_of(store: SequenceStore) -> dict[str, Any]:
    """Return what there is to know about a log, as plain numbers.

    Args:
        store: The store.

    Returns:
        Counts; quartiles, p90, p99, extremes and mean of events per user; the Gini coefficient of
        users; the shares of events of the top 20% of users and of items; users whose last two
        events tie in time (None without times); rows that repeat an earlier pair of user and item.
    """
    lengths = store.lengths()
    popularity = item_counts(store)
    quartiles = np.quantile(lengths, (0.25, 0.5, 0.75, 0.9, 0.99)).tolist()
    ties = store.time_ties
    return {
        "source": store.source,
        "simulated": store.simulated,
        "users": store.num_users,
        "items": store.num_items,
        "events": store.num_events,
        "rows_dropped": store.rows_dropped,
        "events_per_user": {
            "mean": float(lengths.mean()),
            "min": int(lengths.min()),
            **dict(zip(("q25", "q50", "q75", "p90", "p99"), quartiles, strict=True)),
            "max": int(lengths.max()),
        },
        "gini_users": gini(lengths),
        "top_share_users": top_share(lengths),
        "top_share_items": top_share(popularity),
        "users_below_3_events": int(np.count_nonzero(lengths < 3)),
        "time_ties": ties,
        "time_tie_share": None if ties is None else ties / store.num_users,
        "repeated_pairs": repeated_pairs(store),
    }


def strata_summary(strata: Strata) -> list[dict[str, Any]]:
    """Return a row a stratum: that of ``Strata.describe``, with its range of activeness."""
    rows = strata.describe()
    for s, row in enumerate(rows):
        activeness = strata.activeness[strata.ids == s]
        row["min_activeness"], row["max_activeness"] = int(activeness.min()), int(activeness.max())
    return rows


def item_counts(store: SequenceStore) -> IntArray:
    """Return the events of every item, int64 [V]."""
    counts = np.zeros(store.num_items + 1, np.int64)
    for start in range(0, store.num_events, _EVENTS_AT_ONCE):
        part = store.items[start : start + _EVENTS_AT_ONCE]
        counts += np.bincount(part, minlength=store.num_items + 1)
    return counts[1:]


def gini(counts: IntArray) -> float:
    """Return the Gini coefficient: 0 where all are equal, 1 where one has everything."""
    ordered = np.sort(counts).astype(np.float64)
    ranks = np.arange(1, len(ordered) + 1)
    return float(2 * (ranks * ordered).sum() / (len(ordered) * ordered.sum())) - (
        len(ordered) + 1
    ) / len(ordered)


def top_share(counts: IntArray, share: float = HEAD_SHARE) -> float:
    """Return which share of the events the most frequent ``share`` has."""
    ordered = np.sort(counts)[::-1]
    return float(ordered[: max(1, round(share * len(ordered)))].sum() / ordered.sum())


def repeated_pairs(store: SequenceStore) -> int:
    """Return how many rows repeat an earlier (user, item) pair."""
    return store.num_events - len(store.histories.items)
