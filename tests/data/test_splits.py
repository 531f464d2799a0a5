from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import (
    Crop,
    Drop,
    Mask,
    Negatives,
    RaggedLoader,
    Split,
    Strata,
    StratifiedBatchSampler,
    evaluation_batches,
)
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


@pytest.fixture(scope="session")
def timed_store(store_of):
    def build(lengths, times):
        users = np.repeat(np.arange(len(lengths)), lengths)
        return store_of(users, np.arange(len(users)) % 7, list(times))

    return build


def parts_by_user(store, split):
    """Return the positions of the training, validation and test events of every user, as lists."""
    train = [
        list(range(start, end))
        for start, end in zip(store.offsets[:-1], split.train_ends(store), strict=True)
    ]
    held_out = []
    for part in ("valid", "test"):
        users, targets = split.holdout(store, part)
        assert users.dtype == targets.dtype == np.int64
        assert (np.diff(targets) > 0).all()
        assert (np.diff(users) >= 0).all()
        held_out.append([targets[users == u].tolist() for u in range(store.num_users)])
    return list(zip(train, *held_out, strict=True))


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 14), min_size=1, max_size=12), k=st.integers(1, 5))
def test_last_k_are_test_and_k_before_them_valid(store_with_lengths, lengths, k):
    store, split = store_with_lengths(lengths), Split.leave_k_out(k)
    for u, (train, valid, test) in enumerate(parts_by_user(store, split)):
        first, end = store.offsets[u], store.offsets[u + 1]
        size = k if end - first > 2 * k else 0
        assert (len(valid), len(test)) == (size, size)
        assert train + valid + test == list(range(first, end))
        assert len(train) >= 1
    split.assert_no_leak(store)


def test_leaving_one_out_is_leaving_k_out():
    assert Split.leave_k_out(1) == Split.leave_one_out()
    assert Split.leave_k_out(2) != Split.leave_k_out(3)
    assert Split.leave_k_out(2).name == "leave_2_out"


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    tenths=st.sampled_from([(8, 1), (5, 3), (6, 2), (1, 1), (9, 0.5)]),
)
def test_ratio_cuts_every_user_alike(store_with_lengths, lengths, tenths):
    train_share, valid_share = (tenth / 10 for tenth in tenths)
    store, split = store_with_lengths(lengths), Split.ratio(train_share, valid_share)
    for u, (train, valid, test) in enumerate(parts_by_user(store, split)):
        n = lengths[u]
        assert len(valid) == int(n * round(tenths[1] * 100) // 1000)
        assert len(test) == int(n * round((10 - sum(tenths)) * 100) // 1000)
        assert train + valid + test == list(range(store.offsets[u], store.offsets[u + 1]))
        assert len(train) >= 1
    split.assert_no_leak(store)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), kind=st.sampled_from([int, float]))
def test_before_cuts_all_users_at_the_same_moments(timed_store, data, kind):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    total = sum(lengths)
    times = data.draw(st.lists(st.integers(0, 30), min_size=total, max_size=total))
    times = [kind(time) for time in times]
    borders = st.lists(st.integers(1, 30), min_size=2, max_size=2, unique=True).map(sorted)
    valid_time, test_time = data.draw(borders)
    store, split = timed_store(lengths, times), Split.before(valid_time, test_time)
    if min(times) >= valid_time or max(times) < test_time:
        with pytest.raises(DataError, match=r"leave training or test without an event; .* go from"):
            split.train_ends(store)
        return
    for u, (train, valid, test) in enumerate(parts_by_user(store, split)):
        first, end = int(store.offsets[u]), int(store.offsets[u + 1])
        when = {place: store.timestamps[place] for place in range(first, end)}
        assert train == [p for p in when if when[p] < valid_time]
        assert valid == [p for p in when if valid_time <= when[p] < test_time and p > first]
        assert test == [p for p in when if when[p] >= test_time and p > first]
    split.assert_no_leak(store)


def test_users_without_a_training_event_go_to_the_lowest_stratum(timed_store):
    store = timed_store([4, 2, 3], [1, 2, 3, 9, 8, 9, 1, 5, 8])
    split = Split.before(5, 8)
    assert split.train_lengths(store).tolist() == [3, 0, 1]
    strata = Strata.by_activeness(store, split=split, edges=[2])
    assert strata.ids.tolist() == [1, 0, 0]
    assert strata.names == ("0-1 events", "2+ events")


@pytest.mark.parametrize(
    "split",
    [
        Split.leave_one_out(),
        Split.leave_k_out(2),
        Split.ratio(0.5, 0.25),
        Split.before(4, 8),
    ],
    ids=lambda split: split.name,
)
def test_evaluation_reads_everything_before_each_target(timed_store, split):
    """Every split keeps the contract of evaluation: a repeated user is a row for every target."""
    store = timed_store([10, 8, 12], [*range(10), *range(2, 10), *range(12)])
    strata = Strata.from_labels(store, [1, 0, 1], split=split)
    for part in ("valid", "test"):
        users, targets = split.holdout(store, part)
        rows = {}
        for batch in evaluation_batches(
            store, split=split, strata=strata, part=part, max_len=50, batch_size=4
        ):
            ends, windows = batch.history_offsets.tolist(), batch.batch.lengths.tolist()
            for b, (user, target) in enumerate(
                zip(batch.users.tolist(), batch.targets.tolist(), strict=True)
            ):
                history = batch.history[ends[b] : ends[b + 1]].tolist()
                rows[user, windows[b]] = (history, target)
        assert len(rows) == len(users) > 0
        for user, place in zip(users.tolist(), targets.tolist(), strict=True):
            first = store.offsets[user]
            before = sorted(set(store.items[first:place].tolist()))
            expected = (before, store.items[place])
            assert rows[user, place - first] == expected


@settings(deadline=None, max_examples=40)
@given(
    split=st.sampled_from(
        [Split.leave_one_out(), Split.leave_k_out(2), Split.ratio(0.5, 0.25), Split.before(4, 8)]
    ),
    crop=st.sampled_from(["tail", "random_window", "prefix"]),
    targets=st.sampled_from(["next", "last", None]),
    augment=st.sampled_from([(), (Crop(0.7), Drop(0.3)), (Mask(0.4, 0),)]),
    seed=st.integers(0, 5),
)
def test_no_training_row_holds_a_later_event(unique_store, split, crop, targets, augment, seed):
    """Every event has an item of its own, so what a row holds says which events it read."""
    store = unique_store
    strata = Strata.from_labels(store, np.arange(store.num_users) % 2, split=split)
    sampler = StratifiedBatchSampler(strata, batch_size=5, seed=seed)
    loader = RaggedLoader(
        store, sampler, split=split, strata=strata, max_len=6, crop=crop, targets=targets,
        augment=augment, negatives=Negatives(2) if targets else None, seed=seed,
    )  # fmt: skip
    ends, place_of = split.train_ends(store), np.argsort(store.items)
    for batch in loader:
        offsets = batch.offsets.tolist()
        for b, user in enumerate(batch.users.tolist()):
            mine = slice(offsets[b], offsets[b + 1])
            codes = batch.values[mine].tolist()
            places = [place_of[code - 1] for code in codes if code]
            if targets is not None:
                own = batch.targets[mine] if targets == "next" else batch.targets[b : b + 1]
                seen = [place_of[code - 1] for code in own.tolist()]
                # A target comes after what was shown before it.
                latest = -1
                for code, target in zip(codes, seen if targets == "next" else [], strict=False):
                    latest = max(latest, place_of[code - 1] if code else -1)
                    assert target > latest
                places += seen
            assert all(store.offsets[user] <= place < ends[user] for place in places)


@pytest.fixture(scope="module")
def unique_store(store_of):
    rng = np.random.default_rng(1)
    lengths = rng.integers(4, 14, 24)
    times = np.concatenate([np.sort(rng.integers(0, 12, n)) for n in lengths])
    users = np.repeat(np.arange(24), lengths)
    return store_of(users, rng.permutation(len(users)), times)


def test_planted_leaks_in_time_are_noticed(timed_store):
    store = timed_store([4, 4], [0, 1, 2, 3, 5, 6, 7, 8])
    # Cut inside each user, the first user's test is earlier than the second one's training.
    Split.ratio(0.5, 0.25).assert_no_leak(store)
    leaky = replace(Split.ratio(0.5, 0.25), name="leaky", is_global=True)
    with pytest.raises(DataError, match="split leaky: a held-out event at 2 is not later than"):
        leaky.assert_no_leak(store)
    Split.before(2, 6).assert_no_leak(store)


def test_times_are_needed_to_split_by_time(store_with_lengths):
    with pytest.raises(DataError, match="has no timestamps; prepare it with its time column"):
        Split.before(1, 2).train_ends(store_with_lengths([4, 5]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Split.leave_k_out(0), "k: expected an integer >= 1, got 0"),
        (lambda: Split.leave_k_out(True), "k: expected an integer"),
        (lambda: Split.leave_k_out(1.5), "k: expected an integer"),
        (lambda: Split.before(5, 5), "test_time: expected more than 5, got 5"),
        (lambda: Split.before("a", 5), "valid_time: expected a number, got 'a'"),
        (lambda: Split.before(1, float("nan")), "test_time: expected a number"),
        (lambda: Split.ratio(0, 0.5), "train: expected a share between 0 and 1, got 0"),
        (lambda: Split.ratio(0.5, 1), "valid: expected a share"),
        (lambda: Split.ratio(0.9, 0.1), "leave nothing for test"),
        (lambda: Split.ratio(None, 0.1), "train: expected a number, got None"),
    ],
)
def test_bad_splits_are_refused_in_one_line(make, match):
    with pytest.raises(ConfigError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)
