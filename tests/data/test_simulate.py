from __future__ import annotations

import json
import time

import numpy as np
import pyarrow.parquet
import pytest

from pinet_fast.data import Split, Strata, prepare, read_log, simulate_log
from pinet_fast.data.simulate import PARAMETERS_KEY
from pinet_fast.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return simulate_log(tmp_path_factory.mktemp("simulated") / "log.parquet")


@pytest.fixture(scope="module")
def store(log):
    return prepare(log, store_dir=log.parent)


def test_it_is_labelled(log, store):
    assert read_log(log).simulated
    assert store.simulated
    assert "simulated" in repr(store)
    parameters = json.loads(pyarrow.parquet.read_schema(log).metadata[PARAMETERS_KEY])
    assert parameters == {"version": 1, "users": 6000, "items": 1500, "seed": 0}


def test_the_seed_decides_everything(tmp_path):
    one, two, other = (
        simulate_log(tmp_path / f"{i}.parquet", users=50, items=100, seed=seed)
        for i, seed in enumerate([3, 3, 4])
    )
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != other.read_bytes()


def test_it_is_quick(tmp_path):
    begin = time.process_time()
    simulate_log(tmp_path / "log.parquet")
    assert time.process_time() - begin < 3


def test_activeness_has_a_long_tail(store):
    lengths = store.lengths()
    assert store.num_users == 6000
    assert 1400 < store.num_items <= 1500
    assert 70_000 < store.num_events < 100_000
    assert lengths.min() == 5
    assert lengths.max() <= 300
    top = np.sort(lengths)[::-1][:1200].sum() / lengths.sum()
    assert 0.45 < top < 0.65, "share of the most active fifth"
    popularity = np.sort(np.bincount(store.items))[::-1]
    assert popularity[:300].sum() / store.num_events > 0.6
    assert store.time_ties == 0


def item_shares(store, users):
    items = np.concatenate([store.items[store.offsets[u] : store.offsets[u + 1]] for u in users])
    return np.bincount(items, minlength=store.num_items + 1) / len(items)


def test_head_users_prefer_other_items(store):
    strata = Strata.by_activeness(store, split=Split.leave_one_out(), edges="head:0.2")
    tail, head = (np.flatnonzero(strata.ids == s) for s in (0, 1))
    between = np.abs(item_shares(store, tail) - item_shares(store, head)).sum()
    within = np.abs(item_shares(store, tail[::2]) - item_shares(store, tail[1::2])).sum()
    assert between > 2 * within


def test_the_next_item_can_be_learned(store):
    """The two commonest successors of an item predict far better than popularity."""
    follows = np.ones(store.num_events, bool)
    follows[store.offsets[:-1]] = False
    after = np.flatnonzero(follows)
    pairs = store.items[after - 1].astype(np.int64) * (store.num_items + 1) + store.items[after]
    counts = {}
    for pair, count in zip(*np.unique(pairs, return_counts=True), strict=True):
        counts.setdefault(pair // (store.num_items + 1), []).append(int(count))
    hits = sum(sum(sorted(c)[-2:]) for c in counts.values()) / len(after)
    popular = np.sort(np.bincount(store.items))[-2:].sum() / store.num_events
    assert hits > 0.4 > 8 * popular
    assert (store.items[after] != store.items[after - 1]).all()


@pytest.mark.parametrize(
    "options", [{"users": 9}, {"items": 99}, {"seed": -1}, {"users": 10.5}, {"items": True}]
)
def test_bad_sizes_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=f"expected {next(iter(options))} to be an integer"):
        simulate_log(tmp_path / "log.parquet", **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"ending in \.parquet"):
        simulate_log(tmp_path / "log.csv")
    with pytest.raises(DataError, match=r"cannot be written .*folder that exists"):
        simulate_log(tmp_path / "none" / "log.parquet", users=10, items=100)
