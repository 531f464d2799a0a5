"""Logs are sorted on disk: within the memory limit, with progress, and stopped when asked."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from pinet_fast.data import SequenceStore, prepare
from pinet_fast.data._sorting import EventTable
from pinet_fast.errors import StoreError


def test_progress_rises_to_one(tmp_path):
    seen = []
    log = pa.table({"user": np.arange(900) % 40, "item": np.arange(900) % 83})
    prepare(log, store_dir=tmp_path, on_progress=lambda share, text: seen.append((share, text)))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any("reading 900 events" in text for _, text in seen)


def test_sorting_tells_how_far_it_is_and_can_be_stopped(tmp_path):
    table, seen = EventTable(tmp_path, None), []
    count = "SELECT count(*) FROM range({0}) a(i), range({0}) b(j) WHERE hash(i + j) % 7 = 0"
    assert table._waited(lambda: table._run(count.format(20_000))[0] > 0, seen.append)
    assert seen
    assert all(0 <= share <= 1 for share in seen)

    def interrupted(share):
        raise KeyboardInterrupt

    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        table._waited(lambda: table._run(count.format(10**7)), interrupted)
    assert time.perf_counter() - started < 60, "hours of work were not stopped"
    with pytest.raises(StoreError, match="sorting failed there"):
        table._waited(lambda: table._run("SELECT nonsense"), seen.append)
    table.close()


LARGE = """
import resource, sys
import numpy as np, pyarrow as pa
from pinet_fast.data import prepare

ROWS, BLOCK = 8_000_000, 1 << 16
SCHEMA = pa.schema([("user", pa.int64()), ("item", pa.int64()), ("timestamp", pa.int64())])

def blocks():
    rng = np.random.default_rng(0)
    for start in range(0, ROWS, BLOCK):
        n = min(BLOCK, ROWS - start)
        yield pa.record_batch([pa.array(rng.integers(0, high, n)) for high in
                               (400_000, 60_000, 10**9)], schema=SCHEMA)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small = pa.table({"user": [1], "item": [1], "timestamp": [1]})
prepare(small, store_dir=sys.argv[1])  # imports and first uses
before = peak()
reader = pa.RecordBatchReader.from_batches(SCHEMA, blocks())
store = prepare(reader, store_dir=sys.argv[1], memory_limit="100MB")
assert store.num_events == ROWS
print(peak() - before, store.path)
"""


@pytest.mark.slow
def test_memory_stays_near_the_limit(tmp_path):
    """256 MB of numbers and row numbers under a limit of 100 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    growth, path = done.stdout.split()
    assert int(growth) < 200e6, f"{int(growth) / 1e6:.0f} MB over the start"
    store = SequenceStore.open(path)
    rng, seen = np.random.default_rng(0), []
    for start in range(0, 8_000_000, 1 << 16):
        n = min(1 << 16, 8_000_000 - start)
        users, items, times = (rng.integers(0, high, n) for high in (400_000, 60_000, 10**9))
        mine = users == 17
        seen += zip(times[mine].tolist(), items[mine].tolist(), strict=True)
    row = store.user_row(17)
    codes = store.items[store.offsets[row] : store.offsets[row + 1]]
    assert store.item_ids[codes].tolist() == [item for _, item in sorted(seen)]
