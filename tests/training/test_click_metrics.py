"""AUC, GAUC and log loss against counting pairs, one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.training.click_metrics import (
    CandidateScores,
    PooledAUC,
    clicks_by_stratum,
    summarise_clicks,
    user_auc,
    user_log_loss,
)


def random_scores(users: int, n: int, seed: int, levels: int = 5) -> CandidateScores:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(-levels, levels + 1, (users, n + 1)).astype(np.float32)  # many ties
    return CandidateScores(drawn[:, 0], drawn[:, 1:])


def share_of_pairs(positive: list[float], negative: list[float]) -> float:
    won = sum(1.0 if p > q else 0.5 if p == q else 0.0 for p in positive for q in negative)
    return won / (len(positive) * len(negative))


@settings(max_examples=60, deadline=None)
@given(
    users=st.integers(1, 12), n=st.integers(1, 6), seed=st.integers(0, 999),
    levels=st.sampled_from([0, 1, 5, 10_000]),
)  # fmt: skip
def test_against_counting_pairs(users: int, n: int, seed: int, levels: int) -> None:
    scores = random_scores(users, n, seed, levels)
    positive, negatives = scores.positive.tolist(), scores.negatives.tolist()
    pooled = share_of_pairs(positive, [q for row in negatives for q in row])
    assert PooledAUC(scores).of(np.ones(users)) == pytest.approx(pooled)
    own = [share_of_pairs([p], row) for p, row in zip(positive, negatives, strict=True)]
    assert user_auc(scores) == pytest.approx(own)
    for loss, p, row in zip(user_log_loss(scores), positive, negatives, strict=True):
        if levels > 100:
            continue  # the naive formula overflows
        expected = -math.log(1 / (1 + math.exp(-p)))
        expected += np.mean([-math.log(1 - 1 / (1 + math.exp(-q))) for q in row])
        assert loss == pytest.approx(expected / 2)
    got = summarise_clicks(scores)
    assert got["auc"]["mean"] == pytest.approx(pooled)
    assert got["gauc"]["mean"] == pytest.approx(np.mean(own))
    # Repeating a user is the same as a weight of two.
    doubled = scores.chosen(np.ones(users, bool))
    doubled = CandidateScores(
        np.append(doubled.positive, doubled.positive[:1]),
        np.append(doubled.negatives, doubled.negatives[:1], axis=0),
    )
    weights = np.ones(users)
    weights[0] = 2
    expected_auc = PooledAUC(doubled).of(np.ones(users + 1))
    assert PooledAUC(scores).of(weights) == pytest.approx(expected_auc)


def test_a_constant_score_has_auc_one_half() -> None:
    scores = CandidateScores(np.zeros(7, np.float32), np.zeros((7, 3), np.float32))
    got = summarise_clicks(scores)
    assert got["auc"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert got["gauc"]["mean"] == 0.5
    assert got["log_loss"]["mean"] == pytest.approx(math.log(2))


def test_extreme_logits_have_finite_losses() -> None:
    scores = CandidateScores(np.full(2, -1e4, np.float32), np.full((2, 3), 1e4, np.float32))
    assert np.allclose(user_log_loss(scores), 1e4)


def test_interval_is_that_of_resampled_users() -> None:
    scores = random_scores(300, 10, 0)
    rng = np.random.default_rng(1)
    means = user_auc(scores)[rng.integers(0, 300, (4000, 300))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    got = summarise_clicks(scores)["gauc"]
    assert got["low"] == pytest.approx(low, abs=0.2 * (high - low))
    assert got["high"] == pytest.approx(high, abs=0.2 * (high - low))


def test_strata_and_empty_groups() -> None:
    scores = random_scores(10, 4, 3)
    strata = np.array([0] * 4 + [2] * 6)
    groups = clicks_by_stratum(scores, strata, 3)
    assert groups["overall"] == summarise_clicks(scores)
    assert groups["strata"][2] == summarise_clicks(scores.chosen(strata == 2))
    assert groups["strata"][1]["users"] == 0
    assert groups["strata"][1]["auc"] == {"mean": None, "low": None, "high": None}
