"""The kernels against plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import _njit, _njit_negatives

ITEMS = st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=30)
MASK = 2**64 - 1


@st.composite
def windows(draw):
    items = draw(ITEMS)
    pairs = st.tuples(st.integers(0, len(items)), st.integers(0, len(items)))
    cuts = [sorted(pair) for pair in draw(st.lists(pairs, max_size=6))]
    starts = np.array([a for a, _ in cuts], np.int64)
    ends = np.array([b for _, b in cuts], np.int64)
    return np.array(items, np.int32), starts, ends


def offsets_of(lengths):
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


@settings(deadline=None, max_examples=60)
@given(case=windows())
def test_gather_copies_every_window(case):
    items, starts, ends = case
    offsets = offsets_of(ends - starts)
    out = np.full(offsets[-1], -7, np.int64)
    _njit.gather(items, starts, ends, offsets, out)
    assert out.tolist() == [x for a, b in zip(starts, ends, strict=True) for x in items[a:b]]


@settings(deadline=None, max_examples=60)
@given(case=windows())
def test_gather_next_shifts_targets_by_one(case):
    items, starts, ends = case
    starts, ends = starts[ends > starts], ends[ends > starts]
    offsets = offsets_of(ends - starts - 1)
    values, targets = (np.full(offsets[-1], -7, np.int64) for _ in range(2))
    _njit.gather_next(items, starts, ends, offsets, values, targets)
    cuts = list(zip(starts, ends, strict=True))
    assert values.tolist() == [x for a, b in cuts for x in items[a : b - 1]]
    assert targets.tolist() == [x for a, b in cuts for x in items[a + 1 : b]]


@settings(deadline=None, max_examples=60)
@given(case=windows())
def test_unique_histories_are_sorted_sets(case):
    items, starts, ends = case
    histories = np.full((ends - starts).sum(), -7, np.int32)
    offsets = np.full(len(starts) + 1, -7, np.int64)
    _njit_negatives.unique_histories(items, starts, ends, histories, offsets)
    for u, (a, b) in enumerate(zip(starts, ends, strict=True)):
        found = histories[offsets[u] : offsets[u + 1]].tolist()
        assert found == sorted(set(items[a:b].tolist()))


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def subkey(key, counter):
    return mix((key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK)


def negative_reference(key, user, position, draw, history, num_items):
    """Rank the complement by listing it, with Python integers."""
    free = [v for v in range(1, num_items + 1) if v not in history]
    word = subkey(subkey(subkey(key, user), position), draw)
    return free[word * len(free) >> 64]


@settings(deadline=None, max_examples=60)
@given(
    key=st.integers(0, MASK),
    num_items=st.integers(2, 12),
    num_draws=st.integers(1, 3),
    data=st.data(),
)
def test_negatives_equal_the_listed_complement(key, num_items, num_draws, data):
    history = st.sets(st.integers(1, num_items), max_size=num_items - 1)
    histories = data.draw(st.lists(history, min_size=1, max_size=4))
    users = data.draw(st.lists(st.integers(0, len(histories) - 1), min_size=1, max_size=4))
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=len(users), max_size=len(users)))
    firsts = data.draw(st.lists(st.integers(0, 2**40), min_size=len(users), max_size=len(users)))
    flat = np.array([v for h in histories for v in sorted(h)], np.int32)
    out = np.full(sum(lengths) * num_draws, -7, np.int64)
    _njit_negatives.draw_uniform(
        flat,
        offsets_of([len(h) for h in histories]),
        np.array(users),
        False,
        num_items,
        np.array(users),
        np.array(firsts),
        offsets_of(lengths),
        np.uint64(key),
        num_draws,
        out,
        np.zeros(0, np.float32),
    )
    expected = [
        negative_reference(key, user, first + t, j, histories[user], num_items)
        for user, first, length in zip(users, firsts, lengths, strict=True)
        for t in range(length)
        for j in range(num_draws)
    ]
    assert out.tolist() == expected


def test_multiply_high_is_exact_at_the_limits():
    for word in (0, 1, MASK, 2**32 - 1, 2**32, 2**63, MASK - 2**31):
        for bound in (1, 2, 3, 2**31 - 1, 2**32 - 1):
            found = _njit._below(np.uint64(word), np.uint64(bound))
            assert found == word * bound >> 64


def test_first_words_of_splitmix64():
    """The published generator with seed 0 begins with these words."""
    words = [mix(n * 0x9E3779B97F4A7C15 & MASK) for n in (1, 2, 3)]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
