"""The permutation test against flipping every user's sign, and its behaviour under the null."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pinet_fast.report.bootstrap import gains
from pinet_fast.report.schema import METRICS
from pinet_fast.report.significance import PERMUTATIONS, permutation_p_values


def values(metric: str, ranks: np.ndarray) -> np.ndarray:
    return gains(metric)[np.minimum(ranks, 21)]


@pytest.mark.parametrize("metric", ["ndcg@10", "hr@5", "mrr@20"])
def test_p_value_is_that_of_all_sign_flips(metric: str) -> None:
    """Eleven users: all 2048 flips are counted, with the formula of the metric for each user."""
    rng = np.random.default_rng(4)
    first, second = rng.integers(1, 30, 11), rng.integers(1, 14, 11)
    differences = values(metric, second) - values(metric, first)
    sums = np.array([np.dot(signs, differences) for signs in itertools.product((-1, 1), repeat=11)])
    exact = (np.abs(sums) >= abs(differences.sum()) - 1e-12).mean()
    got = permutation_p_values(first, second)[metric]
    assert got == pytest.approx(exact, abs=5 * (exact * (1 - exact) / PERMUTATIONS) ** 0.5 + 1e-4)


def test_equal_and_far_apart_runs() -> None:
    ranks = np.random.default_rng(0).integers(1, 100, 500)
    assert set(permutation_p_values(ranks, ranks).values()) == {1.0}
    better = np.maximum(ranks // 4, 1)
    assert permutation_p_values(ranks, better)["ndcg@10"] == pytest.approx(1 / (1 + PERMUTATIONS))
    none = np.empty(0, np.int64)
    assert permutation_p_values(none, none) == dict.fromkeys(METRICS, 1.0)


def test_runs_that_are_alike_are_rarely_called_different() -> None:
    rng = np.random.default_rng(1)
    small = 0
    for seed in range(200):
        ranks = rng.geometric(0.03, (2, 300))
        small += permutation_p_values(*ranks, seed=seed)["ndcg@10"] <= 0.1
    assert 5 <= small <= 37  # 20 expected, four standard deviations
