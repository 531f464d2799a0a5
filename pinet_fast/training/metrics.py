"""Ranking metrics from ranks, with bootstrap intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

CUTOFFS = (5, 10, 20)
"""K of NDCG@K, HR@K and MRR@K."""

_RESAMPLES = 1000


class Interval(TypedDict):
    """A mean and its 95% bootstrap interval; None where there are no users."""

    mean: float | None
    low: float | None
    high: float | None


def gains(metric: str, cutoff: int, size: int) -> npt.NDArray[np.float64]:
    """Return the metric of a single relevant item by rank: ``out[rank]``, 0 beyond the cutoff.

    ``ndcg``: 1 / log2(rank + 1); ``hr``: 1; ``mrr``: 1 / rank. With one relevant item the ideal
    DCG is 1, so NDCG is the DCG.

    Args:
        metric: ``ndcg``, ``hr`` or ``mrr``.
        cutoff: K.
        size: Length of the table; index 0 is unused.
    """
    rank = np.arange(size, dtype=np.float64)
    positive = np.maximum(rank, 1)
    if metric == "ndcg":
        value = 1 / np.log2(positive + 1)
    elif metric == "mrr":
        value = 1 / positive
    elif metric == "hr":
        value = np.ones(size)
    else:
        raise ConfigError(f"metric: expected ndcg, hr or mrr; got {metric!r}")
    return np.where((rank >= 1) & (rank <= cutoff), value, 0.0)


def summarise(ranks: npt.NDArray[np.int64], seed: int = 0) -> dict[str, int | Interval]:
    """Return all metrics of users with the given target ranks.

    The bootstrap resamples users. Metrics depend on a rank only through the bins 1, 2, ..., 20 and
    "beyond", so a resample of users is a multinomial draw of bin counts: exact, and as cheap for a
    million users as for ten.

    Args:
        ranks: Rank of each user's target among the catalogue, from 1, int64 [M].
        seed: Seed of the bootstrap.

    Returns:
        ``users`` and, for each metric such as ``ndcg@10``, its mean and interval.
    """
    beyond = max(CUTOFFS) + 1
    histogram = np.bincount(np.minimum(ranks, beyond), minlength=beyond + 1)
    num_users = int(histogram.sum())
    out: dict[str, int | Interval] = {"users": num_users}
    shares = None
    if num_users:
        rng = np.random.default_rng(seed)
        shares = rng.multinomial(num_users, histogram / num_users, size=_RESAMPLES) / num_users
    for metric in ("ndcg", "hr", "mrr"):
        for cutoff in CUTOFFS:
            gain = gains(metric, cutoff, beyond + 1)
            out[f"{metric}@{cutoff}"] = _interval(gain, histogram, shares)
    return out


def _interval(
    gain: npt.NDArray[np.float64],
    histogram: npt.NDArray[np.int64],
    shares: npt.NDArray[np.float64] | None,
) -> Interval:
    if shares is None:
        return {"mean": None, "low": None, "high": None}
    low, high = np.quantile(shares @ gain, [0.025, 0.975])
    return {
        "mean": float(histogram @ gain / histogram.sum()),
        "low": float(low),
        "high": float(high),
    }


def mean_metric(ranks: npt.NDArray[np.int64], metric: str = "ndcg", cutoff: int = 10) -> float:
    """Return one metric's mean over users; 0 where there are none."""
    if not len(ranks):
        return 0.0
    table = gains(metric, cutoff, cutoff + 2)
    return float(table[np.minimum(ranks, cutoff + 1)].mean())


def by_stratum(
    ranks: npt.NDArray[np.int64], strata: npt.NDArray[np.int64], num_strata: int
) -> dict[str, object]:
    """Return :func:`summarise` over all users and for each stratum, as metrics.json holds it."""
    groups: Sequence[object] = [summarise(ranks[strata == s]) for s in range(num_strata)]
    return {"overall": summarise(ranks), "strata": groups}
