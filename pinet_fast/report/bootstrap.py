"""Bootstrap intervals of ranking metrics, from ranks.

With one held-out event a user, a metric depends on the rank only through the bins 1, 2, ..., 20 and
"beyond". A bootstrap resample of users is therefore a multinomial draw of bin counts, and a paired
one a draw over pairs of bins: exact, and as cheap for a million users as for ten.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pinet_fast.report.schema import METRICS, IntArray, Interval

RESAMPLES = 1000
"""Resamples of every bootstrap."""

_BEYOND = 21  # the first rank that counts for no metric; index 0 is unused
_NOTHING = Interval(None, None, None)


def gains(metric: str) -> npt.NDArray[np.float64]:
    """Return the metric of a user by the rank of the held-out event, ``out[min(rank, 21)]``."""
    name, cutoff = metric.split("@")
    rank = np.arange(_BEYOND + 1, dtype=np.float64)
    at_least_1 = np.maximum(rank, 1)
    value = {
        "ndcg": 1 / np.log2(at_least_1 + 1),
        "hr": np.ones_like(rank),
        "mrr": 1 / at_least_1,
    }[name]
    return np.where((rank >= 1) & (rank <= int(cutoff)), value, 0.0)


def mean_interval(ranks: IntArray, metric: str = "ndcg@10", seed: int = 0) -> Interval:
    """Return a metric's mean over users and its 95% bootstrap interval."""
    if not len(ranks):
        return _NOTHING
    counts = np.bincount(np.minimum(ranks, _BEYOND), minlength=_BEYOND + 1)
    return _interval(gains(metric), counts, _resampled(counts, seed))


def paired_differences(first: IntArray, second: IntArray, seed: int = 0) -> dict[str, Interval]:
    """Return every metric's mean difference second - first, with paired 95% intervals.

    Args:
        first: Ranks of the users' held-out events under one model, int64 [M].
        second: Ranks under another model, of the same users in the same order.
        seed: Seed of the bootstrap.
    """
    if not len(first):
        return dict.fromkeys(METRICS, _NOTHING)
    width = _BEYOND + 1
    pairs = np.minimum(first, _BEYOND) * width + np.minimum(second, _BEYOND)
    # Most of the 441 pairs of bins do not occur; those that do are all a resample can hold.
    cells, counts = np.unique(pairs, return_counts=True)
    resampled = _resampled(counts, seed)
    out = {}
    for metric in METRICS:
        gain = gains(metric)
        out[metric] = _interval(gain[cells % width] - gain[cells // width], counts, resampled)
    return out


def _resampled(counts: IntArray, seed: int) -> npt.NDArray[np.float64]:
    total = int(counts.sum())
    rng = np.random.default_rng(seed)
    return rng.multinomial(total, counts / total, size=RESAMPLES) / total


def _interval(
    values: npt.NDArray[np.float64], counts: IntArray, resampled: npt.NDArray[np.float64]
) -> Interval:
    low, high = np.quantile(resampled @ values, [0.025, 0.975])
    return Interval(float(counts @ values / counts.sum()), float(low), float(high))
