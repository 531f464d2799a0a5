from __future__ import annotations

import pytest
import torch
from support.batches import ragged_batch
from torch.utils import _pytree as pytree

from pinet_fast.aggregation import StrataIndex
from pinet_fast.data import RaggedLoader, Split, Strata, StratifiedBatchSampler
from pinet_fast.errors import ConfigError

SPLIT = Split.leave_one_out()


@pytest.fixture
def batch():
    return ragged_batch([0, 1, 1], [2, 4, 1], num_strata=2, num_items=9)


def make(store, sampler_options=None, **options):
    strata = Strata.by_activeness(store, split=SPLIT, edges=[5])
    sampler = StratifiedBatchSampler(strata, batch_size=4, **(sampler_options or {}))
    return RaggedLoader(store, sampler, split=SPLIT, strata=strata, max_len=4, **options)


def test_length_is_the_number_of_users(batch):
    assert len(batch) == batch.num_users == 3
    with pytest.raises(TypeError, match="not iterable"):
        iter(batch)


def test_pytree_maps_every_tensor(batch):
    doubled = pytree.tree_map(lambda tensor: tensor * 2, batch)
    assert type(doubled) is type(batch)
    assert torch.equal(doubled.values, batch.values * 2)
    assert torch.equal(doubled.strata.ids, batch.strata.ids * 2)
    assert torch.equal(doubled.strata.events.ids, batch.strata.events.ids * 2)
    assert doubled.strata.events.offsets == batch.strata.events.offsets
    assert doubled.max_len == batch.max_len
    leaves, spec = pytree.tree_flatten(batch)
    assert torch.equal(pytree.tree_unflatten(leaves, spec).negatives, batch.negatives)
    lone = pytree.tree_map(lambda tensor: tensor, StrataIndex([1, 0], 2))
    assert lone.events is None
    assert torch.equal(lone.users.order, torch.tensor([1, 0]))


def test_record_stream_skips_host_memory(batch):
    batch.record_stream(None)


def test_streams_and_page_locks_reach_every_tensor(batch, monkeypatch):
    """Those of the strata too; one that is missed would be copied in the way of everything."""
    streams, locked = [], []

    def lock(tensor):
        locked.append(tensor.clone())
        return locked[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: streams.append(stream))
    pinned = batch.pin_memory()
    leaves = pytree.tree_leaves(pinned)
    assert len(leaves) == len(pytree.tree_leaves(batch)) >= 9
    assert all(any(leaf is tensor for tensor in locked) for leaf in leaves)
    assert pinned.max_len == batch.max_len
    assert pinned.strata.events.offsets == batch.strata.events.offsets
    batch.to("meta").record_stream("stream")
    assert streams == ["stream"] * len(leaves)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(batch, side):
    padded, mask = batch.to_padded(side, value=-1), batch.padded_mask(side)
    assert padded.shape == mask.shape == (3, 4)
    rows = torch.tensor_split(batch.values, batch.offsets[1:-1])
    for row, own in zip(padded.tolist(), rows, strict=True):
        blank = [-1] * (4 - len(own))
        assert row == (blank + own.tolist() if side == "left" else own.tolist() + blank)
    assert torch.equal(padded[mask], batch.values)
    negatives = batch.to_padded(side, rows=batch.negatives)
    assert negatives.shape == (3, 4, 1)
    assert torch.equal(negatives[mask], batch.negatives)


def test_padding_is_refused_for_other_rows(batch):
    with pytest.raises(ConfigError, match="side: expected 'left' or 'right', got 'top'"):
        batch.to_padded("top")
    with pytest.raises(ConfigError, match="one for each of the 7 events"):
        batch.to_padded(rows=batch.users)


def test_nested_is_a_view(batch):
    nested = batch.to_nested()
    assert [len(row) for row in nested.unbind()] == [2, 4, 1]
    assert nested.values().data_ptr() == batch.values.data_ptr()


def test_strata_equal_those_that_are_checked(store_with_lengths):
    store = store_with_lengths([4, 5, 6, 7, 8, 9, 10, 11, 12, 4])
    for batch in make(store):
        strata = batch.strata
        checked = StrataIndex(strata.ids, 2, batch.lengths, strata.user_counts, strata.event_counts)
        assert strata.users.offsets == checked.users.offsets
        assert strata.events.offsets == checked.events.offsets
        assert torch.equal(strata.events.ids, checked.events.ids)
        assert torch.equal(strata.lengths, checked.lengths)
        assert strata.users.order is strata.events.order is checked.users.order is None
        assert repr(strata) == repr(checked)


@pytest.mark.parametrize("crop", ["tail", "random_window", "prefix"])
@pytest.mark.parametrize("targets", ["next", "last", None])
def test_crops_are_windows_of_the_training_events(store_with_lengths, crop, targets):
    store = store_with_lengths([4, 5, 6, 7, 8, 9, 10, 11, 12, 30], num_items=107)
    loader = make(store, {"min_activeness": 1 + (targets is not None)}, crop=crop, targets=targets)
    seen = set()
    for _ in range(12):
        for batch in loader:
            offsets = batch.offsets.tolist()
            for b, user in enumerate(batch.users.tolist()):
                end = SPLIT.train_ends(store)[user]
                train = store.items[store.offsets[user] : end].tolist()
                window = batch.values[offsets[b] : offsets[b + 1]].tolist()
                if targets == "next":
                    own = batch.targets[offsets[b] : offsets[b + 1]].tolist()
                    assert own[:-1] == window[1:]
                    window.append(own[-1])
                elif targets == "last":
                    window.append(int(batch.targets[b]))
                places = [i for i in range(len(train)) if train[i : i + len(window)] == window]
                assert places
                whole = 4 + (targets is not None)
                assert 1 + (targets is not None) <= len(window) <= whole
                if crop == "tail":
                    assert window == train[-whole:]
                elif crop == "random_window":
                    assert len(window) == min(whole, len(train))
                seen.add((user, places[0], len(window)))
    assert (len(seen) > 10) == (crop != "tail")


def test_crops_depend_on_the_seed_and_epoch_alone(store_with_lengths):
    store = store_with_lengths([20, 25, 30, 35, 40, 4])
    for crop in ("random_window", "prefix"):
        one, two = make(store, crop=crop), make(store, crop=crop, threads=2)
        epochs = [[batch.values.tolist() for batch in one] for _ in range(3)]
        assert [[batch.values.tolist() for batch in two] for _ in range(3)] == epochs
        assert epochs[0] != epochs[1]
        other = make(store, crop=crop, seed=1)
        assert [batch.values.tolist() for batch in other] != epochs[0]


def test_weights_of_the_strata_reach_the_users(store_with_lengths):
    store = store_with_lengths([4, 5, 6, 7, 8, 9, 10, 11])
    assert next(iter(make(store))).weights is None  # proportional: all are 1
    loader = make(store, {"mix": "uniform"})
    weights = loader.sampler.stratum_weights
    assert weights[0] != weights[1]
    for batch in loader:
        assert batch.weights.dtype == torch.float32
        expected = torch.tensor(weights, dtype=torch.float32)[batch.strata.ids]
        assert torch.equal(batch.weights, expected)


def test_unknown_crop_is_refused(store_with_lengths):
    with pytest.raises(ConfigError, match="crop: expected 'tail', 'random_window', 'prefix'"):
        make(store_with_lengths([4, 5, 9]), crop="head")
