from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import (
    Drop,
    Negatives,
    RaggedLoader,
    Split,
    Strata,
    StratifiedBatchSampler,
    evaluation_batches,
)
from pinet_fast.errors import CheckpointError, ConfigError, StrataError

SPLIT = Split.leave_one_out()
LENGTHS = st.lists(st.integers(1, 12), min_size=2, max_size=20).map(lambda more: [4, 9, *more])


def make(store, max_len=5, batch_size=4, edges=(5,), negatives=None, seed=0, **options):
    strata = Strata.by_activeness(store, split=SPLIT, edges=list(edges))
    sampler = StratifiedBatchSampler(strata, batch_size=batch_size, seed=seed)
    return RaggedLoader(
        store,
        sampler,
        split=SPLIT,
        strata=strata,
        max_len=max_len,
        negatives=negatives,
        seed=seed,
        **options,
    )


def sequence(store, user):
    return store.items[store.offsets[user] : store.offsets[user + 1]].tolist()


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, max_len=st.integers(1, 8), batch_size=st.integers(1, 9))
def test_batches_hold_the_tail_of_the_training_events(
    store_with_lengths, lengths, max_len, batch_size
):
    store = store_with_lengths(lengths, num_items=40)
    loader = make(store, max_len, batch_size, edges=[3], negatives=Negatives(2))
    seen = []
    batches = list(loader)
    assert len(batches) == len(loader)
    for batch in batches:
        offsets = batch.offsets.tolist()
        assert batch.strata.ids.tolist() == loader.strata.ids[batch.users.numpy()].tolist()
        assert batch.strata.ids.tolist() == sorted(batch.strata.ids.tolist())
        assert batch.strata.num_events == batch.num_events == offsets[-1]
        assert batch.max_len == batch.lengths.max()
        assert batch.negatives.shape == (batch.num_events, 2)
        for b, user in enumerate(batch.users.tolist()):
            items = sequence(store, user)
            train = items[: len(items) - 2] if len(items) >= 3 else items
            window = train[-(max_len + 1) :]
            mine = slice(offsets[b], offsets[b + 1])
            assert batch.values[mine].tolist() == window[:-1]
            assert batch.targets[mine].tolist() == window[1:]
            assert not set(batch.negatives[mine].ravel().tolist()) & set(train)
            seen.append(user)
    assert sorted(seen) == np.flatnonzero(SPLIT.train_lengths(store) >= 2).tolist()


def test_no_held_out_event_is_in_any_training_batch(store_of):
    """Every held-out event has an item of its own, so that a leak shows."""
    lengths = [3, 4, 6, 9, 15]
    users, items = np.repeat(np.arange(5), lengths), np.zeros(sum(lengths), np.int64)
    ends = np.cumsum(lengths)
    items[:] = np.arange(len(items)) % 7
    items[ends - 1], items[ends - 2] = 1000 + np.arange(5), 2000 + np.arange(5)
    store = store_of(users, items)
    held_out = set(np.flatnonzero(store.item_ids >= 1000).tolist())
    assert len(held_out) == 10
    for batch in make(store, max_len=50, batch_size=2, edges=[5]):
        assert not held_out & set(batch.values.tolist())
        assert not held_out & set(batch.targets.tolist())


def test_types_counts_and_repr(store_with_lengths):
    loader = make(store_with_lengths([4, 5, 9, 12]), negatives=Negatives(1))
    batch = next(iter(loader))
    for tensor in (batch.values, batch.offsets, batch.users, batch.targets, batch.negatives):
        assert tensor.dtype == torch.int64
    assert batch.num_users == 4
    assert batch.strata.user_counts == (2, 2)
    assert batch.strata.event_counts == (2 + 3, 7 + 10)
    text = repr(batch)
    for part in ("users=[4]", f"values=[{batch.num_events}]", "strata=2", "max_len=5"):
        assert part in text


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("values", "offsets", "users", "targets", "negatives")
    )


def test_batch_moves_to_a_device(store_with_lengths):
    batch = next(iter(make(store_with_lengths([4, 5, 9]), negatives=Negatives(1))))
    assert same(batch.to("cpu"), batch)
    moved = batch.to("meta")
    assert moved.values.device.type == moved.strata.ids.device.type == "meta"
    assert moved.max_len == batch.max_len
    plain = next(iter(make(store_with_lengths([4, 5, 9])))).to("cpu")
    assert plain.negatives is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batch_moves_to_the_gpu(store_with_lengths):
    batch = next(iter(make(store_with_lengths([4, 5, 9]), negatives=Negatives(1))))
    pinned = batch.pin_memory()
    assert pinned.values.is_pinned()
    assert same(pinned.to("cuda", non_blocking=True).to("cpu"), batch)


@pytest.mark.parametrize("stop", range(9))
def test_resume_after_any_batch_is_bit_identical(store_with_lengths, stop):
    store = store_with_lengths([4, 5, 6, 7, 8, 9, 10, 11, 12, 4, 5])

    def loader():
        return make(store, batch_size=3, negatives=Negatives(2), seed=1)

    whole, first = loader(), loader()
    stream = [batch for _ in range(3) for batch in whole]
    seen = []
    while len(seen) < stop:
        for batch in first:
            seen.append(batch)
            if len(seen) == stop:
                break
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    while len(seen) < len(stream):
        seen += list(resumed)
    assert len(seen) == len(stream)
    assert all(same(a, b) for a, b in zip(seen, stream, strict=True))


def test_a_state_goes_with_the_options_that_decide_the_batches(store_with_lengths):
    store = store_with_lengths([4, 5, 6, 7, 8, 9])
    loader = make(store, negatives=Negatives(2), threads=1)
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    for options in (
        {"max_len": 6}, {"seed": 1}, {"targets": "last"}, {"crop": "prefix"},
        {"augment": Drop(0.5)}, {"negatives": Negatives(3)}, {"negatives": None},
    ):  # fmt: skip
        other = make(store, **{"negatives": Negatives(2)} | options)
        with pytest.raises(CheckpointError, match=rf"loader state: .*{next(iter(options))} "):
            other.load_state_dict(state)
        assert other.state_dict()["step"] == 0
    same_options = make(store, negatives=Negatives(2), threads=0, lifetime="lease", augment=[])
    same_options.load_state_dict(state)
    assert same_options.state_dict() == state
    # A state of the sampler alone says nothing of the loader, and is taken.
    make(store).load_state_dict(loader.sampler.state_dict())


def test_negatives_change_every_epoch_but_not_with_max_len(store_with_lengths):
    store = store_with_lengths([9, 9, 9, 20])
    by_user = []
    for max_len in (3, 50):
        loader = make(store, max_len=max_len, edges=[8], negatives=Negatives(1))
        epochs = [next(iter(list(loader))) for _ in range(2)]
        assert not torch.equal(epochs[0].negatives, epochs[1].negatives)
        last = epochs[0].offsets[1:] - 1
        order = epochs[0].users.argsort()
        by_user.append(epochs[0].negatives[last][order].tolist())
    assert by_user[0] == by_user[1]


def test_set_epoch_and_context_manager(store_with_lengths):
    store = store_with_lengths([4, 5, 9, 12])
    with make(store, negatives=Negatives(1)) as loader:
        second = [list(loader), list(loader)][1]
    again = make(store, negatives=Negatives(1))
    again.set_epoch(1)
    assert all(same(a, b) for a, b in zip(again, second, strict=True))
    loader.close()


def test_bad_options_are_refused(store_with_lengths):
    store, other = store_with_lengths([4, 5, 9]), store_with_lengths([4, 5, 10])
    with pytest.raises(ConfigError, match="max_len: expected an integer >= 1"):
        make(store, max_len=0)
    with pytest.raises(ConfigError, match="targets: expected"):
        make(store, targets="previous")
    strata = Strata.by_activeness(store, split=SPLIT, edges=[5])
    strange = Strata.by_activeness(other, split=SPLIT, edges=[5])
    options = {"split": SPLIT, "max_len": 3}
    sampler = StratifiedBatchSampler(strata, batch_size=2)
    with pytest.raises(StrataError, match="made from another store"):
        RaggedLoader(store, sampler, strata=strange, **options)
    with pytest.raises(ConfigError, match="the sampler draws from other strata"):
        RaggedLoader(other, sampler, strata=strange, **options)
    lone = StratifiedBatchSampler(strata, batch_size=2, min_activeness=1)
    with pytest.raises(ConfigError, match="min_activeness >= 2, not 1"):
        RaggedLoader(store, lone, strata=strata, **options)
    with pytest.raises(CheckpointError, match="belongs to another"):
        make(store).load_state_dict(make(other).state_dict())


@settings(deadline=None, max_examples=40)
@given(
    lengths=LENGTHS,
    max_len=st.integers(1, 8),
    batch_size=st.integers(1, 9),
    part=st.sampled_from(["valid", "test"]),
)
def test_evaluation_covers_every_held_out_event(
    store_with_lengths, lengths, max_len, batch_size, part
):
    store = store_with_lengths(lengths)
    strata = Strata.by_activeness(store, split=SPLIT, edges=[3])
    back = 1 if part == "test" else 2
    users = []
    for batch in evaluation_batches(
        store, split=SPLIT, strata=strata, part=part, max_len=max_len, batch_size=batch_size
    ):
        assert batch.strata_ids.tolist() == strata.ids[batch.users.numpy()].tolist()
        assert batch.strata_ids.tolist() == sorted(batch.strata_ids.tolist())
        assert batch.batch.targets is None
        offsets, starts = batch.batch.offsets.tolist(), batch.history_offsets.tolist()
        for b, user in enumerate(batch.users.tolist()):
            items = sequence(store, user)
            before = items[: len(items) - back]
            assert batch.targets[b] == items[len(items) - back]
            assert batch.history[starts[b] : starts[b + 1]].tolist() == sorted(set(before))
            values = batch.batch.values[offsets[b] : offsets[b + 1]].tolist()
            assert values == before[-max_len:]
        block = sorted(batch.users.tolist())
        assert len(block) <= batch_size
        users += block
    assert users == [u for u, n in enumerate(lengths) if n >= 3]


def test_evaluation_options_are_checked_at_the_call(store_with_lengths):
    store, other = store_with_lengths([4, 5, 9]), store_with_lengths([4, 5, 10])
    strata = Strata.by_activeness(store, split=SPLIT, edges=[5])
    options = {"split": SPLIT, "strata": strata, "max_len": 3, "batch_size": 2}
    for change in ({"max_len": 0}, {"batch_size": 0}, {"part": "train"}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            evaluation_batches(store, **options | change)
    with pytest.raises(StrataError, match="another store"):
        evaluation_batches(other, **options)
    batch = next(evaluation_batches(store, **options)).to("meta")
    assert batch.history.device.type == batch.batch.values.device.type == "meta"
