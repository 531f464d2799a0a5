"""Batches and negatives from a store, opening one, and the first batch on a machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pinet_fast import (
    Negatives,
    RaggedLoader,
    SequenceStore,
    Split,
    Strata,
    StratifiedBatchSampler,
    prepare,
)
from pinet_fast.data import simulate_log

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_ragged_batch_over_memcpy(
    tmp_path: Path, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "data"
    log = simulate_log(tmp_path / "log.parquet", users=6000, items=1500)
    store = prepare(log, store_dir=tmp_path)
    split = Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")
    sampler = StratifiedBatchSampler(strata, batch_size=256)
    loader = RaggedLoader(store, sampler, split=split, strata=strata, max_len=50)
    drawn = list(loader)
    assert sum(b.num_users for b in drawn) == store.num_users
    assert all(bool((b.values > 0).all()) for b in drawn)
    source = np.concatenate([b.values.numpy() for b in drawn])
    target = np.empty_like(source)
    paired(lambda: list(loader), lambda: np.copyto(target, source), rounds=20)


def test_negatives_over_set_rejection(
    tmp_path: Path, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "negatives"
    store = prepare(
        simulate_log(tmp_path / "log.parquet", users=6000, items=1500), store_dir=tmp_path
    )
    bound = Negatives(1, exclude="history").bind(store, Split.leave_one_out())
    users = np.random.default_rng(0).permutation(store.num_users)[:1024]
    ends = Split.leave_one_out().train_ends(store)
    sets = {u: set(store.items[store.offsets[u] : ends[u]].tolist()) for u in users.tolist()}
    offsets, firsts = np.arange(len(users) + 1) * 30, np.ones(len(users), np.int64)
    rng = np.random.default_rng(1)

    def rejection() -> np.ndarray:
        drawn = rng.integers(1, store.num_items + 1, 30 * len(users))
        for t, item in enumerate(drawn.tolist()):
            mine = sets[int(users[t // 30])]
            while item in mine:
                item = int(rng.integers(1, store.num_items + 1))
                drawn[t] = item
        return drawn

    drawn = bound.draw(0, users, firsts, offsets)
    for found in (drawn.ravel(), rejection()):
        rows = found.reshape(len(users), 30)
        pairs = zip(users.tolist(), rows.tolist(), strict=True)
        assert not any(sets[user] & set(row) for user, row in pairs)
    paired(lambda: bound.draw(0, users, firsts, offsets), rejection, rounds=20)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_over_none(
    threads: int, tmp_path: Path, paired: Callable[..., Any], benchmark: Any
) -> None:
    """An epoch of batches with as much work between them as it takes to build one."""
    benchmark.group = "loader"
    store = prepare(
        simulate_log(tmp_path / "log.parquet", users=20_000, items=1500), store_dir=tmp_path
    )
    split = Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")
    weight = torch.randn(256, 256)

    def loader(threads: int) -> RaggedLoader:
        sampler = StratifiedBatchSampler(strata, batch_size=512)
        return RaggedLoader(
            store, sampler, split=split, strata=strata, max_len=50, negatives=Negatives(1),
            threads=threads,
        )  # fmt: skip

    def epoch(batches: RaggedLoader) -> None:
        for _ in batches:
            weight @ weight

    mine, inline = loader(threads), loader(0)
    for one, other in zip(mine, inline, strict=True):
        assert torch.equal(one.values, other.values)
    paired(lambda: epoch(mine), lambda: epoch(inline), rounds=20)


def test_open_over_reading(tmp_path: Path, paired: Callable[..., Any], benchmark: Any) -> None:
    """Opening a store: no byte is allocated for values, whatever its size."""
    benchmark.group = "open"
    rng = np.random.default_rng(0)
    lengths = np.clip((rng.pareto(1.1, 60_000) + 1) * 8, 2, 5000).astype(np.int64)
    log = pa.table({
        "user": np.repeat(np.arange(len(lengths)), lengths),
        "item": rng.integers(0, 100_000, lengths.sum()),
    })  # fmt: skip
    store = prepare(log, store_dir=tmp_path)
    values = store.items.nbytes + store.histories.items.nbytes + store.histories.firsts.nbytes
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    opened = SequenceStore.open(store.path, verify=False)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pa.total_allocated_bytes() == before
    assert opened.items.flags.owndata is False
    # What is there beside Arrow's maps is for checking the offsets, 8 bytes a user, and goes.
    assert kept < 100_000
    assert peak < 9 * store.num_users + 1_000_000
    benchmark.extra_info.update(kept_bytes=kept, peak_bytes=peak, value_bytes=values)
    paired(
        lambda: SequenceStore.open(store.path, verify=False),
        lambda: SequenceStore.open(store.path, verify=True),
        rounds=10,
    )


_FIRST = """
import sys, time
from pinet_fast import *
started = time.process_time()
store = prepare(sys.argv[1], store_dir=sys.argv[2])
prepared = time.process_time()
split = Split.leave_one_out()
strata = Strata.by_activeness(store, split=split, edges="head:0.2")
sampler = StratifiedBatchSampler(strata, batch_size=64)
loader = RaggedLoader(
    store, sampler, split=split, strata=strata, max_len=20, negatives=Negatives(1)
)
next(iter(loader))
print(prepared - started, time.process_time() - prepared)
"""


def test_first_batch_with_a_cold_cache(tmp_path: Path, benchmark: Any, capsys: Any) -> None:
    """CPU seconds from an empty Numba cache to the first batch; at most 10 are wanted."""
    benchmark.group = "start"
    log = simulate_log(tmp_path / "log.parquet", users=500, items=300)
    seconds = {}
    for name in ("cold", "warm"):
        command = [sys.executable, "-c", _FIRST, str(log), str(tmp_path / name)]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        whole = time.perf_counter() - started
        prepared, first = map(float, done.stdout.split())
        seconds[name] = {"whole": whole, "prepare": prepared, "first_batch": first}
    benchmark.extra_info.update(seconds)
    benchmark.pedantic(lambda: None, rounds=1)
    with capsys.disabled():
        for name, found in seconds.items():
            shown = ", ".join(f"{part} {value:.2f} s" for part, value in found.items())
            print(f"\n{name} cache: {shown}", end="")
        print()
    assert seconds["cold"]["first_batch"] < 10
