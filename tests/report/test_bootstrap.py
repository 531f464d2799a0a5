from __future__ import annotations

import math

import numpy as np
import pytest

from pinet_fast.report.bootstrap import gains, mean_interval, paired_differences


def test_gains_by_hand():
    ndcg, hr, mrr = gains("ndcg@5"), gains("hr@10"), gains("mrr@20")
    assert ndcg[[1, 3, 5, 6, 21]] == pytest.approx([1, 0.5, 1 / math.log2(6), 0, 0])
    assert hr[[0, 1, 10, 11]].tolist() == [0, 1, 1, 0]
    assert mrr[[1, 4, 20, 21]] == pytest.approx([1, 0.25, 0.05, 0])


def test_no_users_have_no_interval():
    nobody = np.empty(0, dtype=np.int64)
    assert mean_interval(nobody).mean is None
    assert paired_differences(nobody, nobody)["ndcg@10"].low is None


def test_interval_agrees_with_resampled_users():
    rng = np.random.default_rng(0)
    ranks = rng.geometric(0.08, 2000)
    values = gains("ndcg@10")[np.minimum(ranks, 21)]
    plain = [values[rng.integers(0, 2000, 2000)].mean() for _ in range(2000)]
    interval = mean_interval(ranks)
    assert interval.mean == pytest.approx(values.mean())
    # Quantiles of a thousand resamples are known to about a twentieth of the interval's width.
    width = interval.high - interval.low
    expected = np.quantile(plain, [0.025, 0.975])
    assert [interval.low, interval.high] == pytest.approx(expected, abs=0.08 * width)


def test_paired_interval_covers_the_planted_difference():
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        first = rng.geometric(0.05, 1500)
        # Every user is moved to rank 1 with probability 0.1, which gains 0.1 * (1 - HR@5).
        second = np.where(rng.random(1500) < 0.1, 1, first)
        true = 0.1 * (1 - (1 - 0.95**5))
        interval = paired_differences(first, second, seed)["hr@5"]
        covered += interval.low <= true <= interval.high
    assert covered >= 34  # of 40 at 95%; 33 or fewer have probability below 1%


def test_pairing_makes_intervals_narrow():
    rng = np.random.default_rng(1)
    first = rng.geometric(0.05, 3000)
    second = np.where(rng.random(3000) < 0.02, 1, first)
    paired = paired_differences(first, second)["ndcg@10"]
    single = mean_interval(first)
    assert paired.high - paired.low < 0.5 * (single.high - single.low)


def test_equal_ranks_differ_by_nothing():
    ranks = np.arange(1, 50)
    difference = paired_differences(ranks, ranks)["mrr@10"]
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert not difference.excludes_zero
