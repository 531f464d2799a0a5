"""Distributions, exclusions and fixed sets of negatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import (
    Negatives,
    RaggedLoader,
    Split,
    Strata,
    StratifiedBatchSampler,
    evaluation_batches,
)
from pinet_fast.data._njit_negatives import complement_draw
from pinet_fast.data.negatives import Popularity
from pinet_fast.errors import ConfigError, DataError

SPLIT = Split.leave_one_out()


@pytest.fixture(scope="module")
def store(store_with_lengths):
    lengths = np.random.default_rng(2).integers(3, 12, 40)
    return store_with_lengths(lengths.tolist(), num_items=45)


def make(store, negatives, batch_size=5, **options):
    strata = Strata.by_activeness(store, split=SPLIT, edges=[5])
    sampler = StratifiedBatchSampler(strata, batch_size=batch_size, seed=3)
    options = {"max_len": 4, "seed": 3} | options
    return RaggedLoader(store, sampler, split=SPLIT, strata=strata, negatives=negatives, **options)


def excluded_of(store, batch, exclude, per, targets):
    """Return the set of items that each row of the negatives must not hold."""
    offsets = batch.offsets.tolist()
    rows = []
    for b, user in enumerate(batch.users.tolist()):
        mine = slice(offsets[b], offsets[b + 1])
        size = offsets[b + 1] - offsets[b] if targets == "next" else 1
        own = batch.targets[mine] if targets == "next" else batch.targets[b : b + 1]
        if exclude == "history":
            end = SPLIT.train_ends(store)[user]
            items = set(store.items[store.offsets[user] : end].tolist())
        elif exclude == "sequence":
            items = set(store.items[store.offsets[user] : store.offsets[user + 1]].tolist())
        elif exclude == "window":
            items = set(batch.values[mine].tolist()) | set(own.tolist())
        elif exclude == "targets":
            items = set(own.tolist())
        else:
            items = set()
        if per == "event":
            rows += [{int(t)} for t in own] if exclude == "targets" else [items] * size
        else:
            rows.append(items)
    return rows if per != "batch" else [set().union(*rows)]


@pytest.mark.parametrize("dist", ["uniform", "popularity"])
@pytest.mark.parametrize("per", ["event", "user", "batch"])
@pytest.mark.parametrize("exclude", ["history", "window", "targets", "none", "sequence"])
@pytest.mark.parametrize("targets", ["next", "last"])
def test_no_negative_is_ever_excluded(store, dist, per, exclude, targets):
    negatives = Negatives(7, exclude, per=per, dist=dist, log_q=True)
    # Popularity with the exponent 3 meets the popular history all the time.
    loader = make(store, negatives, targets=targets, batch_size=3)
    for _ in range(4):
        for batch in loader:
            rows = batch.negatives.reshape(-1, 7).tolist()
            expected = excluded_of(store, batch, exclude, per, targets)
            assert len(rows) == len(expected)
            for row, items in zip(rows, expected, strict=True):
                assert not items & set(row)
                assert all(1 <= item <= store.num_items for item in row)
            assert batch.negatives_log_q.shape == batch.negatives.shape
            assert batch.negatives_log_q.dtype == torch.float32
            if dist == "uniform":
                q = [-np.log(store.num_items - len(items)) for items in expected]
                log_q = batch.negatives_log_q.reshape(-1, 7)
                assert np.allclose(log_q, np.array(q)[:, None], atol=1e-6)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float((((counts - expected) ** 2)[expected > 0] / expected[expected > 0]).sum())


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0, 3.0])
@pytest.mark.parametrize("exclude", ["history", "none"])
def test_popularity_follows_the_training_counts(store, alpha, exclude):
    bound = Negatives(1, exclude, dist="popularity", alpha=alpha).bind(store, SPLIT)
    user, num = 7, 40_000
    log_q = np.empty((num, 1), np.float32)
    drawn = bound.draw(0, np.array([user]), np.array([1]), np.array([0, num]), log_q=log_q).ravel()
    train = [store.items[a:b] for a, b in zip(store.offsets[:-1], SPLIT.train_ends(store),
                                              strict=True)]  # fmt: skip
    counts = np.bincount(np.concatenate(train), minlength=store.num_items + 1)
    weights = np.maximum(counts, 1.0) ** alpha
    weights[0] = 0
    if exclude == "history":
        weights[train[user]] = 0
    probabilities = weights / weights.sum()
    found = np.bincount(drawn, minlength=store.num_items + 1)
    assert found[weights == 0].sum() == 0
    # 99.99% of the chi-square distribution with at most 44 degrees of freedom lie below 89.
    assert chi_square(found, probabilities) < 89
    assert np.allclose(np.exp(log_q.ravel()), probabilities[drawn], rtol=1e-4)


def test_exact_complement_has_the_right_distribution():
    """The way out after too many tries, which hardly ever happens by itself."""
    weights = np.array([1.0, 50.0, 3.0, 2.0, 90.0, 4.0])
    popularity = Popularity.of(weights)
    excluded = np.array([2, 5], np.int32)
    units = (np.arange(10_000) + 0.5) / 10_000
    drawn = [complement_draw(popularity.cumulative, excluded, 0, 2, u) for u in units]
    assert np.bincount(drawn, minlength=7).tolist() == [0, 1000, 0, 3000, 2000, 0, 4000]
    alone = np.array([1, 2, 3, 4, 5], np.int32)
    ends = [complement_draw(popularity.cumulative, alone, 0, 5, u) for u in (0.0, 1.0)]
    assert ends == [6, 6]


def test_dominant_history_item_is_never_drawn(store_of):
    # Item 0 has nearly all events, and user 0 has it: sixteen tries mostly fail.
    users = [0] * 5 + [1] * 400 + [2] * 4
    items = [0, 1, 0, 2, 3] + [0] * 400 + [0, 4, 5, 6]
    store = store_of(users, items)
    bound = Negatives(5, dist="popularity", alpha=2.0).bind(store, SPLIT)
    drawn = bound.draw(0, np.array([0]), np.array([1]), np.array([0, 4000]))
    assert set(drawn.ravel().tolist()) == {3, 4, 5, 6, 7}


@settings(deadline=None, max_examples=40)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
def test_alias_table_holds_the_weights(weights):
    popularity = Popularity.of(np.array(weights))
    share = popularity.keep.copy()
    for column, other in enumerate(popularity.alias):
        if other != column:
            share[other] += 1 - popularity.keep[column]
    assert np.allclose(share / len(weights), np.array(weights) / sum(weights), atol=1e-12)
    assert np.isclose(popularity.cumulative[-1], 1)


@pytest.mark.parametrize("per", ["event", "user"])
@pytest.mark.parametrize("dist", ["uniform", "popularity"])
def test_draws_do_not_depend_on_the_batch(store, per, dist):
    def by_user(batch_size):
        found = {}
        for batch in make(store, Negatives(3, per=per, dist=dist), batch_size=batch_size):
            offsets = batch.offsets.tolist()
            for b, user in enumerate(batch.users.tolist()):
                rows = slice(offsets[b], offsets[b + 1]) if per == "event" else b
                found[user] = batch.negatives[rows].tolist()
        return found

    assert by_user(3) == by_user(11)


def test_draws_per_batch_change_with_the_step_and_epoch(store):
    loader = make(store, Negatives(10, "none", per="batch"))
    draws = [tuple(batch.negatives.tolist()) for _ in range(2) for batch in loader]
    assert len(set(draws)) == len(draws)
    assert all(len(draw) == 10 for draw in draws)


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("exclude", ["history", "targets", "sequence"])
def test_frozen_negatives_are_the_same_in_every_evaluation(store, part, exclude):
    frozen = Negatives(20, exclude, per="user", dist="popularity").frozen(store, SPLIT, part=part)
    strata = Strata.by_activeness(store, split=SPLIT, edges=[5])

    def by_user(batch_size, negatives):
        found = {}
        for batch in evaluation_batches(
            store, split=SPLIT, strata=strata, part=part, max_len=3, batch_size=batch_size,
            negatives=negatives,
        ):  # fmt: skip
            offsets = batch.history_offsets.tolist()
            for b, user in enumerate(batch.users.tolist()):
                row = batch.negatives[b].tolist()
                history = batch.history[offsets[b] : offsets[b + 1]].tolist()
                assert int(batch.targets[b]) not in row
                assert exclude == "targets" or not set(history) & set(row)
                whole = store.items[store.offsets[user] : store.offsets[user + 1]].tolist()
                assert exclude != "sequence" or not set(whole) & set(row)
                found[user] = row
        assert batch.to("meta").negatives.device.type == "meta"
        return found

    first = by_user(4, frozen)
    again = Negatives(20, exclude, per="user", dist="popularity").frozen(store, SPLIT, part=part)
    assert by_user(13, again) == first
    other = Negatives(20, exclude, per="user", dist="popularity")
    assert by_user(4, other.frozen(store, SPLIT, part=part, seed=1)) != first
    wrong = "valid" if part == "test" else "test"
    with pytest.raises(ConfigError, match="freeze them for this store and part"):
        by_user(4, other.frozen(store, SPLIT, part=wrong))


def test_valid_and_test_have_sets_of_their_own(store):
    options = Negatives(20, "targets", per="user")
    sets = [options.frozen(store, SPLIT, part=part) for part in ("valid", "test")]
    users, positions = SPLIT.holdout(store, "test")
    assert (sets[0].draw(users, positions) != sets[1].draw(users, positions)).any()


def test_impossible_negatives_are_refused(store, store_of):
    for options in ({"per": "row"}, {"dist": "zipf"}, {"alpha": "1"}, {"alpha": float("nan")}):
        with pytest.raises(ConfigError, match=f"negatives: expected.*{next(iter(options))}"):
            Negatives(**options)
    for options in ({"per": "batch"}, {"exclude": "window"}):
        with pytest.raises(ConfigError, match="frozen ones belong to a user"):
            Negatives(**options).frozen(store, SPLIT)
    with pytest.raises(ConfigError, match="need targets"):
        make(store, Negatives(1), targets=None)
    tiny = store_of([8, 8, 8, 8, 9, 9, 9], [1, 2, 1, 2, 1, 1, 1])
    with pytest.raises(DataError, match="user 8 has all 2 items"):
        Negatives(1).frozen(tiny, SPLIT).draw(np.array([0]), np.array([3]))
    bound = Negatives(1, "window", per="user").bind(tiny, SPLIT)
    with pytest.raises(DataError, match="no negative is left"):
        bound.draw(0, np.array([0]), np.array([1]), np.array([0, 1]), starts=np.array([0]),
                   ends=np.array([2]))  # fmt: skip


@pytest.fixture(scope="module")
def greedy_store(store_of):
    """User 0 trains on all but five of 3,000 items, user 1 on all but one, user 2 on three."""
    free, last = [3, 700, 701, 2999, 3000], [1500]
    histories = [[i for i in range(1, 3001) if i not in left] for left in (free, last)]
    rows = [[*history, left[0], left[0]] for history, left in zip(histories, (free, last),
                                                                 strict=True)]  # fmt: skip
    rows += [[1, 2, 3, 4, 5], [*free, *[3000] * 40]]
    return store_of(np.repeat(np.arange(4), [len(row) for row in rows]), np.concatenate(rows))


@pytest.mark.parametrize("dist", ["uniform", "popularity"])
@pytest.mark.parametrize("per", ["event", "user"])
def test_users_with_almost_the_whole_catalogue_get_what_is_left(greedy_store, dist, per):
    """Rejection alone would try 600 times a draw, and 3,000 times; the bound is 16."""
    store, num = greedy_store, 4000
    bound = Negatives(num, dist=dist, per=per).bind(store, SPLIT)
    users, offsets = np.array([0, 1]), np.array([0, 1, 2])
    log_q = np.empty((2, num), np.float32)
    drawn = bound.draw(0, users, np.ones(2, np.int64), offsets, log_q=log_q)
    left = [store.item_code(item) for item in (3, 700, 701, 2999, 3000)]
    counts = np.bincount(drawn[0], minlength=store.num_items + 1)
    assert counts[left].sum() == num
    weights = np.ones(5)
    if dist == "popularity":
        ends = SPLIT.train_ends(store)
        train = np.concatenate([store.items[store.offsets[u] : ends[u]] for u in range(4)])
        weights = np.bincount(train, minlength=store.num_items + 1)[left].astype(float)
        assert weights.max() > 10 * weights.min()
    probabilities = weights / weights.sum()
    # 99.99% of the chi-square distribution with 4 degrees of freedom lie below 24.
    assert chi_square(counts[left], probabilities) < 24
    chances = dict(zip(left, probabilities, strict=True))
    assert np.allclose(np.exp(log_q[0]), [chances[item] for item in drawn[0]], rtol=1e-3)
    assert set(drawn[1].tolist()) == {store.item_code(1500)}
    assert np.allclose(log_q[1], 0, atol=1e-3)
