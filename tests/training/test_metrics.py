"""Ranking metrics and their intervals, against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.errors import AggregationError, ConfigError
from pinet_fast.training.evaluate import target_ranks
from pinet_fast.training.metrics import by_stratum, gains, mean_metric, summarise

RANKS = np.array([1, 2, 5, 10, 11, 20, 21, 4000])


def test_metrics_by_hand() -> None:
    got = summarise(RANKS)
    dcg = 1 + 1 / math.log2(3) + 1 / math.log2(6) + 1 / math.log2(11)
    assert got["users"] == 8
    assert got["ndcg@10"]["mean"] == pytest.approx(dcg / 8)  # type: ignore[index]
    assert got["hr@5"]["mean"] == pytest.approx(3 / 8)  # type: ignore[index]
    assert got["hr@20"]["mean"] == pytest.approx(6 / 8)  # type: ignore[index]
    assert got["mrr@10"]["mean"] == pytest.approx((1 + 0.5 + 0.2 + 0.1) / 8)  # type: ignore[index]
    assert mean_metric(RANKS) == pytest.approx(dcg / 8)
    assert mean_metric(RANKS, "hr", 5) == pytest.approx(3 / 8)


def test_interval_is_that_of_resampled_users() -> None:
    """The multinomial over rank bins is the bootstrap over users, computed here the long way."""
    ranks = np.random.default_rng(0).geometric(0.05, size=400)
    values = gains("ndcg", 10, 12)[np.minimum(ranks, 11)]
    rng = np.random.default_rng(1)
    means = values[rng.integers(0, 400, (4000, 400))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    got = summarise(ranks)["ndcg@10"]
    assert isinstance(got, dict)
    spread = high - low
    assert got["low"] == pytest.approx(low, abs=0.12 * spread)
    assert got["high"] == pytest.approx(high, abs=0.12 * spread)


def test_a_group_without_users_has_no_numbers() -> None:
    groups = by_stratum(RANKS, np.zeros(8, dtype=np.int64), 2)
    empty = groups["strata"][1]  # type: ignore[index]
    assert empty["users"] == 0
    assert empty["ndcg@10"] == {"mean": None, "low": None, "high": None}
    assert mean_metric(np.empty(0, dtype=np.int64)) == 0.0


def test_unknown_metric() -> None:
    with pytest.raises(ConfigError, match="ndcg, hr or mrr"):
        gains("auc", 10, 12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranks_against_sorting_each_user(data: st.DataObject) -> None:
    num_items = data.draw(st.integers(2, 12))
    num_users = data.draw(st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 10_000)))
    scores = torch.randint(-3, 4, (num_users, num_items + 1)).float()  # many ties
    targets, histories = [], []
    for _ in range(num_users):
        targets.append(data.draw(st.integers(1, num_items)))
        histories.append(data.draw(st.lists(st.integers(1, num_items), max_size=8)))
    expected = []
    for user, (target, history) in enumerate(zip(targets, histories, strict=True)):
        rivals = [i for i in range(1, num_items + 1) if i != target and i not in history]
        own = float(scores[user, target])
        expected.append(1 + sum(float(scores[user, i]) >= own for i in rivals))
    got = target_ranks(
        scores,
        torch.tensor(targets),
        torch.tensor([i for history in histories for i in history], dtype=torch.int64),
        torch.tensor([0, *(len(h) for h in histories)]).cumsum(0),
    )
    assert got.tolist() == expected


def test_diverged_scores_are_an_error() -> None:
    scores = torch.tensor([[0.0, torch.nan, 1.0]])
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(AggregationError, match="diverged"):
        target_ranks(scores, torch.tensor([1]), none, torch.tensor([0, 0]))
