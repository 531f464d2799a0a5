"""The gather kernels that prefetch against the plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import _njit, _prefetch


def offsets_of(lengths):
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


@st.composite
def windows(draw):
    num = draw(st.integers(1, 120))
    cuts = draw(st.lists(st.tuples(st.integers(0, num), st.integers(0, num)), max_size=40))
    starts = np.array([min(cut) for cut in cuts], np.int64)
    ends = np.array([max(cut) for cut in cuts], np.int64)
    return np.arange(1, num + 1, dtype=np.int32), starts, ends


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@settings(deadline=None, max_examples=60)
@given(case=windows(), spare=st.integers(0, 20))
def test_gather_equals_the_plain_loop(dtype, case, spare):
    items, starts, ends = case
    offsets = offsets_of(ends - starts)
    expected, found = (np.full(offsets[-1] + spare, -7, dtype) for _ in range(2))
    _njit.gather(items, starts, ends, offsets, expected)
    _prefetch.gather(items, starts, ends, offsets, found)
    assert found[: offsets[-1]].tolist() == expected[: offsets[-1]].tolist()


@settings(deadline=None, max_examples=60)
@given(case=windows())
def test_gather_next_equals_the_plain_loop(case):
    items, starts, ends = case
    starts, ends = starts[ends > starts], ends[ends > starts]
    offsets = offsets_of(ends - starts - 1)
    expected, found = (np.full((2, offsets[-1]), -7, np.int64) for _ in range(2))
    _njit.gather_next(items, starts, ends, offsets, *expected)
    _prefetch.gather_next(items, starts, ends, offsets, *found)
    assert (found == expected).all()


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    crop=st.sampled_from([_njit.TAIL, _njit.RANDOM_WINDOW, _njit.PREFIX]),
    window=st.integers(1, 12),
    shift=st.integers(0, 1),
    key=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_plan_chooses_windows_of_the_user(lengths, crop, window, shift, key, data):
    strata = data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    users = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=40)), np.int64)
    borders, window = offsets_of(lengths), window + shift
    spans = np.empty(2 * len(lengths), np.int64)
    spans[::2], spans[1::2] = borders[:-1], np.array(lengths) << _njit.SPAN_BITS | strata
    made = []
    for plan in (_njit.plan, _prefetch.plan):
        out = [np.full(len(users), -7, np.int64) for _ in range(3)]
        offsets, ids = np.full(len(users) + 1, -7, np.int64), np.full(len(users), -7, np.int64)
        plan(spans, users, crop, window, shift, np.uint64(key), *out, offsets, ids)
        made.append([*(array.tolist() for array in (*out, offsets, ids))])
    assert made[0] == made[1]
    starts, ends, positions, offsets, ids = (np.array(array, np.int64) for array in made[0])
    assert ids.tolist() == [strata[u] for u in users]
    assert (starts >= borders[users]).all()
    assert (ends <= borders[users + 1]).all()
    assert (positions == starts - borders[users]).all()
    sizes, own = ends - starts, np.array(lengths)[users]
    assert (np.diff(offsets) == np.maximum(sizes - shift, 0)).all()
    if crop == _njit.PREFIX:
        assert (sizes >= np.minimum(shift + 1, own)).all()
        assert (sizes <= window).all()
    else:
        assert (sizes == np.minimum(own, window)).all()
    if crop == _njit.TAIL:
        assert (ends == borders[users + 1]).all()


def test_plain_loop_serves_where_the_intrinsic_cannot_be_built():
    calls = []

    def broken(*arrays):
        calls.append("fast")
        raise RuntimeError("no such intrinsic")

    chosen = _prefetch.with_fallback(broken, lambda *arrays: calls.append("plain"))
    chosen()
    chosen()
    assert calls == ["fast", "plain", "plain"]
