"""Paired permutation tests of ranking metrics between two runs, from ranks.

Under the hypothesis that the runs are alike, each user's difference has either sign with equal
chance. Users with the same pair of rank bins have the same difference, so a random draw of all
signs is a binomial draw for each pair of bins: exact, and as cheap for a million users as for ten.
"""

from __future__ import annotations

import numpy as np

from pinet_fast.report.bootstrap import gains
from pinet_fast.report.schema import METRICS, IntArray

PERMUTATIONS = 10_000
"""Draws of every test; the smallest p-value is 1 / 10,001."""

_BEYOND = 21  # as in bootstrap: ranks from here on count for no metric


def permutation_p_values(first: IntArray, second: IntArray, seed: int = 0) -> dict[str, float]:
    """Return the two-sided p-value of every metric's mean difference, second against first.

    A p-value is (1 + draws at least as far from 0 as what was seen) / (1 + draws), so it is never
    0. Without users it is 1. Nothing is corrected for looking at many metrics, strata or runs.

    Args:
        first: Ranks of the users' held-out events under one model, int64 [M].
        second: Ranks under another model, of the same users in the same order.
        seed: Seed of the draws.
    """
    if not len(first):
        return dict.fromkeys(METRICS, 1.0)
    width = _BEYOND + 1
    pairs = np.minimum(first, _BEYOND) * width + np.minimum(second, _BEYOND)
    cells, counts = np.unique(pairs, return_counts=True)
    differs = cells // width != cells % width
    cells, counts = cells[differs], counts[differs]
    rng = np.random.default_rng(seed)
    flips = 2 * rng.binomial(counts, 0.5, size=(PERMUTATIONS, len(cells))) - counts
    out = {}
    for metric in METRICS:
        gain = gains(metric)
        values = gain[cells % width] - gain[cells // width]
        seen, drawn = abs(float(counts @ values)), np.abs(flips @ values)
        # Sums of the same numbers in another order differ by rounding only.
        extreme = int((drawn >= seen * (1 - 1e-9)).sum())
        out[metric] = (1 + extreme) / (1 + PERMUTATIONS)
    return out
