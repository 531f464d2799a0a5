"""Augmentations against a slow oracle that draws with Python integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import (
    Crop,
    Drop,
    Mask,
    Negatives,
    RaggedLoader,
    Reorder,
    Split,
    Strata,
    StratifiedBatchSampler,
)
from pinet_fast.errors import ConfigError

SPLIT = Split.leave_one_out()
NUM_ITEMS = 60
TOKEN = NUM_ITEMS + 1
WORD = 2**64 - 1

SHARES = st.sampled_from([0.05, 0.2, 0.5, 0.7, 0.95])
AUGMENTATIONS = st.one_of(
    st.builds(Crop, SHARES | st.just(1.0)),
    st.builds(Mask, SHARES, st.sampled_from([0, TOKEN, TOKEN + 5])),
    st.builds(Reorder, SHARES | st.just(1)),
    st.builds(Drop, SHARES),
)


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def subkey(key, counter):
    return mix((key + (counter + 1) * 0x9E3779B97F4A7C15) & WORD)


def below(word, bound):
    return word * bound >> 64


def unit(word):
    return (word >> 11) * 2.0**-53


def augmented(chain, seed, epoch, user, events):
    """Return (place among the user's events, token or None) of what is left of a window."""
    keys = np.random.SeedSequence(seed, spawn_key=(epoch, 5)).generate_state(len(chain), np.uint64)
    row = [(place, None) for place in events]
    for one, key in zip(chain, keys.tolist(), strict=True):
        key = subkey(key, user)
        if isinstance(one, Crop):
            size = max(1, int(one.share * len(row) + 1e-9))
            first = below(subkey(key, 0), len(row) - size + 1)
            row = row[first : first + size]
        elif isinstance(one, Mask):
            row = [
                (place, one.token if unit(subkey(key, place)) < one.share else token)
                for place, token in row
            ]
        elif isinstance(one, Reorder):
            size = int(one.share * len(row) + 1e-9)
            first = below(subkey(key, 0), len(row) - size + 1)
            part = row[first : first + size]
            for i in range(size - 1, 0, -1):
                j = below(subkey(key, i), i + 1)
                part[i], part[j] = part[j], part[i]
            row[first : first + size] = part
        else:
            row = [e for e in row if unit(subkey(key, e[0])) >= one.share] or row[-1:]
    return row


@pytest.fixture(scope="module")
def store(store_with_lengths):
    lengths = np.random.default_rng(4).integers(2, 30, 40)
    return store_with_lengths(lengths.tolist(), num_items=NUM_ITEMS)


def make(store, augment, seed=0, max_len=12, batch_size=7, **options):
    strata = Strata.by_activeness(store, split=SPLIT, edges=[9])
    least = 2 if options.get("targets", "next") else 1
    sampler = StratifiedBatchSampler(strata, batch_size=batch_size, seed=seed, min_activeness=least)
    return RaggedLoader(
        store, sampler, split=SPLIT, strata=strata, max_len=max_len, augment=augment, seed=seed,
        **options,
    )  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(
    chain=st.lists(AUGMENTATIONS, min_size=1, max_size=4),
    targets=st.sampled_from(["next", "last", None]),
    seed=st.integers(0, 3),
    max_len=st.integers(1, 15),
)
def test_batches_equal_the_oracle(store, chain, targets, seed, max_len):
    if targets == "next":
        chain = [one for one in chain if not isinstance(one, Reorder)] or [Crop(0.5)]
    loader = make(store, chain, seed, max_len, targets=targets)
    ends = SPLIT.train_lengths(store)
    for epoch in range(2):
        for batch in loader:
            borders = batch.offsets.tolist()
            assert batch.strata.num_events == borders[-1] == batch.num_events
            assert batch.max_len == int(batch.lengths.max())
            for b, user in enumerate(batch.users.tolist()):
                items = store.items[store.offsets[user] : store.offsets[user + 1]].tolist()
                last = int(ends[user]) - (targets is not None)
                row = augmented(chain, seed, epoch, user, range(max(0, last - max_len), last))
                mine = slice(borders[b], borders[b + 1])
                expected = [items[place] if token is None else token for place, token in row]
                assert batch.values[mine].tolist() == expected
                if targets == "next":
                    assert batch.targets[mine].tolist() == [items[place + 1] for place, _ in row]
                elif targets == "last":
                    assert int(batch.targets[b]) == items[max(place for place, _ in row) + 1]


CHAIN = [Drop(0.2), Crop(0.8), Mask(0.3, 0)]


def content(batch):
    return [t.tolist() for t in (batch.values, batch.offsets, batch.users, batch.targets,
                                 batch.negatives)]  # fmt: skip


def test_stream_is_the_same_for_any_threads_and_after_a_resume(store):
    options = {"crop": "random_window", "negatives": Negatives(2)}
    plain = make(store, CHAIN, **options)
    stream = [content(batch) for _ in range(2) for batch in plain]
    for threads in (1, 4):
        other = make(store, CHAIN, threads=threads, **options)
        assert [content(batch) for _ in range(2) for batch in other] == stream
    for stop in range(1, len(stream)):
        first, seen = make(store, CHAIN, threads=stop % 3, **options), []
        while len(seen) < stop:
            for batch in first:
                seen.append(content(batch))
                if len(seen) == stop:
                    break
        resumed = make(store, CHAIN, **options)
        resumed.load_state_dict(first.state_dict())
        while len(seen) < len(stream):
            seen += [content(batch) for batch in resumed]
        assert seen == stream


def test_a_user_gets_the_same_whatever_the_batch(store):
    def by_user(batch_size, epoch):
        loader = make(store, CHAIN, batch_size=batch_size)
        loader.set_epoch(epoch)
        return {
            user: batch.values[batch.offsets[b] : batch.offsets[b + 1]].tolist()
            for batch in loader
            for b, user in enumerate(batch.users.tolist())
        }

    assert by_user(3, 1) == by_user(11, 1)
    assert by_user(3, 1) != by_user(3, 2)


def test_negatives_avoid_the_history_of_augmented_users_too(store):
    for batch in make(store, CHAIN, negatives=Negatives(5), targets="last"):
        for user, row in zip(batch.users.tolist(), batch.negatives.tolist(), strict=True):
            start, count = store.offsets[user], SPLIT.train_lengths(store)[user]
            assert not set(row) & set(store.items[start : start + count].tolist())


@pytest.mark.parametrize(("one", "events"), [(Mask(0.3, TOKEN), 0.3), (Drop(0.3), 0.7)])
def test_shares_are_met(store_with_lengths, one, events):
    """Within four standard deviations of the binomial law."""
    store = store_with_lengths([500] * 20, num_items=NUM_ITEMS)
    strata = Strata.from_labels(store, [0, 1] * 10, split=SPLIT)
    sampler = StratifiedBatchSampler(strata, batch_size=20)
    loader = RaggedLoader(
        store, sampler, split=SPLIT, strata=strata, max_len=400, augment=one
    )  # fmt: skip
    found = total = 0
    for _ in range(5):
        for batch in loader:
            total += 20 * 400
            found += (
                int((batch.values == TOKEN).sum()) if isinstance(one, Mask) else len(batch.values)
            )
    assert abs(found / total - events) < 4 * np.sqrt(0.3 * 0.7 / total)


def test_crops_begin_anywhere_and_orders_are_all_there(store_with_lengths):
    """Every place of a crop, and every order of three events, comes equally often."""
    store = store_with_lengths([6] * 4000, num_items=NUM_ITEMS)  # 4 events of each train
    strata = Strata.from_labels(store, [0, 1] * 2000, split=SPLIT)
    shuffled = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for one, size, kept in (
        (Crop(0.5), 4, [(0, 1), (1, 2), (2, 3)]),
        (Reorder(1.0), 3, shuffled),
    ):
        sampler = StratifiedBatchSampler(strata, batch_size=4000)
        loader = RaggedLoader(
            store, sampler, split=SPLIT, strata=strata, max_len=size, augment=one, targets=None
        )
        batch = next(iter(loader))
        ends = torch.from_numpy(store.offsets[batch.users.numpy()] + 4)
        windows = torch.from_numpy(store.items.astype(np.int64))[
            ends[:, None] - size + torch.arange(size)
        ]
        rows = batch.values.view(-1, len(kept[0]))
        distinct = torch.tensor([len(set(window)) == size for window in windows.tolist()])
        is_case = [(rows == windows[:, list(case)]).all(1) & distinct for case in kept]
        counts = np.array([int(case.sum()) for case in is_case])
        assert counts.sum() == int(distinct.sum())
        expected = counts.sum() / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < 26, "p < 1e-4 at 5 degrees of freedom"


def test_what_would_be_wrong_is_refused(store):
    with pytest.raises(ConfigError, match="show events their own targets"):
        make(store, [Crop(0.5), Reorder(0.5)])
    with pytest.raises(ConfigError, match="item of the catalogue"):
        make(store, Mask(0.5, NUM_ITEMS))
    for augment in ("crop", ["crop"], [Crop], 3, None):
        with pytest.raises(ConfigError, match="augment: expected Crop"):
            make(store, augment)
    for kind, share in [(Crop, 0), (Crop, 1.1), (Drop, 1), (Drop, 1.0), (Reorder, "half"),
                        (Reorder, True), (Crop, float("nan"))]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"{kind.__name__}: expected a share above 0"):
            kind(share)
    for token in (-1, 1.5, True):
        with pytest.raises(ConfigError, match="integer token >= 0"):
            Mask(0.5, token)
