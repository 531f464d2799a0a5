"""Stores that change while they are open, and what opening them leaves behind."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest

from pinet_fast.data import (
    Negatives,
    RaggedLoader,
    SequenceStore,
    Split,
    Strata,
    StratifiedBatchSampler,
    evaluation_batches,
    prepare,
)
from pinet_fast.data import loader as loader_module
from pinet_fast.errors import StoreError

SPLIT = Split.leave_one_out()


@pytest.fixture
def log(write_log):
    rng = np.random.default_rng(0)
    return write_log({"user": rng.integers(0, 40, 900), "item": rng.integers(5, 90, 900)})


@pytest.fixture
def store(log, tmp_path):
    return prepare(log, store_dir=tmp_path)


def loader_of(store, threads=0):
    strata = Strata.by_activeness(store, split=SPLIT, edges="head:0.2")
    sampler = StratifiedBatchSampler(strata, batch_size=4)
    return RaggedLoader(
        store, sampler, split=SPLIT, strata=strata, max_len=9, negatives=Negatives(1),
        threads=threads,
    )  # fmt: skip


def write_in_place(path, place, value):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(value)


def append(path):
    with path.open("ab") as file:
        file.write(b"more")


# Cutting the file while a thread reads it would end the process, as for any mapped file.
@pytest.mark.parametrize(
    ("change", "threads"),
    [("value", 0), ("value", 2), ("append", 0), ("append", 2), ("touch", 2), ("cut", 0)],
)
def test_a_file_written_to_while_open_ends_the_batches(store, threads, change, monkeypatch):
    monkeypatch.setattr(loader_module, "_WORDS_AT_A_TIME", 1)  # nothing is built ahead
    raw, items = store.path.read_bytes(), store.items.tobytes()
    loader = loader_of(store, threads)
    batches = iter(loader)
    next(batches)
    if change == "value":
        write_in_place(store.path, raw.index(items), b"\x63")
    elif change == "append":
        append(store.path)
    elif change == "cut":
        os.truncate(store.path, 100)
    else:
        os.utime(store.path, ns=(0, 0))
    with pytest.raises(StoreError, match=r"written to while it was open.*prepare the log again"):
        for _ in batches:
            pass
    with pytest.raises(StoreError, match="written to while"):
        next(iter(loader))
    strata = loader.strata
    with pytest.raises(StoreError, match="written to while"):
        list(evaluation_batches(store, split=SPLIT, strata=strata, max_len=5, batch_size=9))
    with pytest.raises(StoreError, match="written to while"):
        Negatives(1).bind(store, SPLIT)


def test_batches_that_were_built_before_are_those_of_the_log(store):
    """Small ones are built together; the next that is built sees the change."""
    expected = [batch.values.tolist() for batch in loader_of(store)]
    loader = loader_of(store)
    batches = iter(loader)
    seen = [next(batches).values.tolist()]
    append(store.path)
    seen += [batch.values.tolist() for batch in batches]
    assert seen == expected
    with pytest.raises(StoreError, match="written to while"):
        next(iter(loader))


def test_a_file_replaced_or_deleted_while_open_is_no_harm(log, store):
    """As ``prepare`` does it: the map is still that of the old file."""
    expected = [batch.values.tolist() for batch in loader_of(store)]
    good = store.path.read_bytes()
    other = store.path.with_name("other")
    other.write_bytes(good[:200])
    other.replace(store.path)
    assert [batch.values.tolist() for batch in loader_of(store)] == expected
    prepare(log, store_dir=store.path.parent)
    assert store.path.read_bytes() == good
    store.path.unlink()
    assert [batch.values.tolist() for batch in loader_of(store)] == expected


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_opening_a_store_again_and_again_leaves_nothing_behind(store):
    def held():
        gc.collect()
        with open("/proc/self/maps") as maps:
            mapped = sum(store.path.name in line for line in maps)
        return len(os.listdir("/proc/self/fd")), mapped

    def use(times):
        for _ in range(times):
            opened = SequenceStore.open(store.path)
            next(iter(loader_of(opened, threads=1)))

    use(5)
    before = held()
    use(200)
    assert held() <= before
