"""Sorted histories: against plain sets, and negatives from them against lists built anew."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import Negatives, SequenceStore, Split, _njit_negatives
from pinet_fast.data._exclusion import unique_lists
from pinet_fast.data._histories import histories_of
from pinet_fast.data.bound_negatives import _key

SEQUENCES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=8)
SPLITS = [
    Split.leave_one_out(),
    Split.leave_k_out(2),
    Split.ratio(0.5, 0.25),
    Split.before(4, 8),
]


def offsets_of(sequences):
    return np.concatenate(([0], np.cumsum([len(s) for s in sequences]))).astype(np.int64)


@settings(deadline=None, max_examples=80)
@given(sequences=SEQUENCES, at_once=st.sampled_from([1, 5, 1000]))
def test_histories_are_sorted_sets_with_first_places(sequences, at_once):
    items = np.array([item for s in sequences for item in s], np.int32)
    parts = list(histories_of(items, offsets_of(sequences), at_once))
    lengths, found, places = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert lengths.tolist() == [len(set(s)) for s in sequences]
    assert found.tolist() == [item for s in sequences for item in sorted(set(s))]
    assert places.tolist() == [s.index(item) for s in sequences for item in sorted(set(s))]


@settings(deadline=None, max_examples=40)
@given(sequences=SEQUENCES, data=st.data())
def test_history_before_any_event_is_the_set_of_what_came_first(store_of, sequences, data):
    users = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    store = store_of(users, [item for s in sequences for item in s])
    assert (np.diff(store.histories.offsets) <= store.lengths()).all()
    drawn = np.array(data.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=6)), np.int64)
    counts = np.array([data.draw(st.integers(0, len(sequences[u]))) for u in drawn], np.int64)
    items, borders = store.histories.before(drawn, counts)
    for b, (u, count) in enumerate(zip(drawn, counts, strict=True)):
        own = store.item_ids[items[borders[b] : borders[b + 1]]].tolist()
        assert own == sorted(set(sequences[u][:count]))


@pytest.fixture(scope="module")
def store(store_of):
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 30, 50)
    users = np.repeat(np.arange(50), lengths)
    times = np.concatenate([np.sort(rng.integers(0, 12, n)) for n in lengths])
    return store_of(users, rng.zipf(1.3, len(users)) % 60, times)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
@pytest.mark.parametrize("dist", ["uniform", "popularity"])
def test_negatives_are_those_of_lists_built_from_the_training_events(store, split, dist):
    """Every draw is the one that the events themselves, sorted anew, would give."""
    bound = Negatives(3, dist=dist).bind(store, split, seed=7)
    users = np.random.default_rng(0).permutation(store.num_users)
    firsts, offsets = np.arange(len(users)) % 5, np.arange(len(users) + 1) * 4
    items, borders = unique_lists(store.items, store.offsets[:-1], split.train_ends(store))
    expected = np.empty((4 * len(users), 3), np.int64)
    rest = (users, firsts, offsets, _key(7, 2, 1), 3, expected.reshape(-1), np.zeros(0, np.float32))
    if dist == "uniform":
        _njit_negatives.draw_uniform(items, borders, users, False, store.num_items, *rest)
    else:
        p = bound.popularity
        _njit_negatives.draw_weighted(
            items, borders, users, False, p.cumulative, p.keep, p.alias, *rest
        )  # fmt: skip
    assert (bound.draw(2, users, firsts, offsets) == expected).all()


def test_binding_negatives_builds_no_list(store_with_lengths):
    """Neither opening nor binding nor drawing for a few users holds the histories in memory."""
    store = store_with_lengths([20_000] * 40, num_items=30_000)
    size = store.histories.items.nbytes
    assert size > 1 << 20
    few = np.arange(2)
    Negatives(1).bind(store, SPLITS[0]).draw(0, few, few, np.arange(3))  # compiled
    tracemalloc.start()
    opened = SequenceStore.open(store.path, verify=False)
    bound = Negatives(1).bind(opened, SPLITS[0])
    bound.draw(0, few, few, np.arange(3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 8
