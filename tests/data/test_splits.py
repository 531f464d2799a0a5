from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import Split
from pinet_fast.errors import ConfigError, DataError


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_last_is_test_and_last_but_one_is_valid(store_with_lengths, lengths):
    store, split = store_with_lengths(lengths), Split.leave_one_out()
    expected = [n - 2 if n >= 3 else n for n in lengths]
    assert split.train_lengths(store).tolist() == expected
    assert (split.train_ends(store) - store.offsets[:-1]).tolist() == expected
    for part, back in (("valid", 2), ("test", 1)):
        users, targets = split.holdout(store, part)
        assert users.tolist() == [u for u, n in enumerate(lengths) if n >= 3]
        assert targets.tolist() == [store.offsets[u + 1] - back for u in users]
    split.assert_no_leak(store)


def test_unknown_part_is_refused(store_with_lengths):
    with pytest.raises(ConfigError, match="expected 'valid' or 'test'"):
        Split.leave_one_out().holdout(store_with_lengths([3]), "train")


def test_planted_leaks_are_noticed(store_with_lengths):
    store = store_with_lengths([3, 1, 6])

    class AllTrain(Split):
        def train_ends(self, store):
            return store.offsets[1:]

    class Swapped(Split):
        def holdout(self, store, part="test"):
            return super().holdout(store, "test" if part == "valid" else "valid")

    class NoTrain(Split):
        def train_ends(self, store):
            return store.offsets[:-1]

    for leak in (AllTrain("all"), Swapped("swapped"), NoTrain("none")):
        with pytest.raises(DataError, match=f"split {leak.name}: "):
            leak.assert_no_leak(store)


def test_users_are_not_mixed_up_by_another_offset_table(store_with_lengths):
    store = store_with_lengths([4, 4])
    shifted = replace(store, offsets=np.array([0, 5, 8]))
    assert Split.leave_one_out().train_lengths(shifted).tolist() == [3, 1]
