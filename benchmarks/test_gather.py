"""Cutting and copying the windows of a batch: against a plain loop, copying, and two threads."""

from __future__ import annotations

import ctypes
import queue
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from benchmarks.gathering import (
    BATCH,
    FAR,
    KEY,
    MAX_LEN,
    Case,
    Gather,
    case,
    compared,
    fast,
    windows,
)
from pinet_fast.data import _njit, _prefetch
from pinet_fast.data.floor import MemoryFloor, random_places, read_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["case"]  # the fixture, found by its name


def events_of(case: Case) -> float:
    lengths = np.diff(case.offsets)[case.batches]
    return float(np.minimum(lengths, MAX_LEN).sum() / len(case.batches))


def test_gather_over_plain_loop(
    case: Case, paired: Callable[..., Any], benchmark: Any, capsys: Any
) -> None:
    benchmark.group = "gather"
    mine, plain = fast(case), Gather(case, _njit.plan, _njit.gather, first=FAR)
    for users in case.batches[:3]:
        expected = np.concatenate(windows(case, users))
        assert (mine.batch(users) == expected).all()
        assert (plain.batch(users) == expected).all()
    compared(mine, plain, paired, benchmark, capsys, rounds=100)


def test_gather_over_memcpy(
    case: Case, paired: Callable[..., Any], benchmark: Any, capsys: Any
) -> None:
    benchmark.group = "gather"
    size = int(events_of(case))
    target, places = np.empty(size, np.int32), iter(range(10**9))
    num_blocks = len(case.items) // size

    def copy() -> None:
        first = next(places) * 7919 % num_blocks * size  # a prime: blocks that do not adjoin
        np.copyto(target, case.items[first : first + size])

    compared(fast(case), copy, paired, benchmark, capsys, rounds=100)


def test_gather_over_floor(case: Case, benchmark: Any, capsys: Any, tmp_path: Path) -> None:
    """Eta of the gather; the lower cost of a random line counts, Numba's or that of a loop in C."""
    benchmark.group = "gather"
    size = events_of(case)
    costs = MemoryFloor.measure(table_bytes=case.items.nbytes, copy_bytes=int(size) * 4 // 8 * 8)
    in_c = c_line_seconds(tmp_path, case.items.nbytes)
    line = costs.line_seconds
    costs = replace(costs, line_seconds=float(np.nanmin((line, in_c))))
    mine, times = fast(case), []
    for users in case.batches:
        started = time.perf_counter()
        mine.batch(users)
        times.append(time.perf_counter() - started)
    seconds = float(np.median(times))
    benchmark.pedantic(mine, rounds=3, iterations=1)
    eta = costs.seconds(BATCH, round(size)) / seconds
    benchmark.extra_info.update(
        eta=eta, t_rand_ns=line * 1e9, t_rand_c_ns=in_c * 1e9,
        copy_gb_per_s=costs.copy_rate / 1e9,
    )  # fmt: skip
    with capsys.disabled():
        print(
            f"\neta {eta:.3f}: {seconds * 1e6:.0f} us a batch, "
            f"t_rand {line * 1e9:.1f} ns "
            f"(C loop {in_c * 1e9:.1f}), copy {costs.copy_rate / 1e9:.1f} GB/s"
        )


C_LOOP = """
#include <time.h>
double line_seconds(const long long *table, const long long *places, long long count) {
  struct timespec a, b;
  volatile long long total = 0;
  long long sum = 0;
  clock_gettime(CLOCK_MONOTONIC, &a);
  for (long long i = 0; i < count; ++i) sum += table[places[i]];
  clock_gettime(CLOCK_MONOTONIC, &b);
  total = sum;
  (void)total;
  return ((b.tv_sec - a.tv_sec) + 1e-9 * (b.tv_nsec - a.tv_nsec)) / count;
}
"""


def c_line_seconds(folder: Path, num_bytes: int) -> float:
    """Return the cost of a random line by a loop in C, or nan without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform == "win32":
        return float("nan")
    (folder / "line.c").write_text(C_LOOP)
    library = folder / "line.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(folder / "line.c")]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).line_seconds
    function.restype = ctypes.c_double
    table = np.ones(num_bytes // 8, np.int64)
    assert read_at(table, random_places(len(table), 1)[:1000]) == 1000
    pointer = ctypes.POINTER(ctypes.c_longlong)
    return min(
        function(table.ctypes.data_as(pointer), places.ctypes.data_as(pointer), len(places))
        for places in np.array_split(random_places(len(table), 1), 5)
    )


@njit(nogil=True)
def many_gathers(
    case: tuple[np.ndarray, ...], first: int, count: int, parts: tuple[np.ndarray, ...]
) -> None:
    """Gather batch after batch without Python in between."""
    items, spans, batches = case
    starts, ends, positions, offsets, ids, out = parts
    for i in range(first, first + count):
        users = batches[i % batches.shape[0]]
        _prefetch._plan(spans, users, 0, MAX_LEN, 0, KEY, starts, ends, positions, offsets, ids)
        _prefetch._gather(items, starts, ends, offsets, out)


@njit(nogil=True)
def arithmetic(rounds: int) -> np.uint64:
    """Multiply: what two cores do without memory."""
    x = np.uint64(1)
    for _ in range(rounds):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return x


class Pair:
    """Two threads that wait for work; starting threads would be measured otherwise."""

    def __init__(self) -> None:
        self._jobs = [queue.SimpleQueue(), queue.SimpleQueue()]
        self._done: Any = queue.SimpleQueue()
        for k, jobs in enumerate(self._jobs):
            threading.Thread(target=self._work, args=(k, jobs), daemon=True).start()

    def _work(self, k: int, jobs: Any) -> None:
        while (job := jobs.get()) is not None:
            job(k)
            self._done.put(None)

    def __call__(self, job: Callable[[int], None]) -> None:
        """Do a job on both threads."""
        for jobs in self._jobs:
            jobs.put(job)
        for _ in self._jobs:
            self._done.get()

    def close(self) -> None:
        """End the threads."""
        for jobs in self._jobs:
            jobs.put(None)


def test_two_threads_over_one(case: Case, benchmark: Any, capsys: Any) -> None:
    """Scaling: the rate of two threads over twice that of one; 1 is linear, 0.9 is wanted.

    Beside the gather stand what the machine itself allows, without any line of Python while it
    runs: the same kernels called from a kernel, independent random reads, and plain arithmetic. All
    alternate, a few milliseconds each, and lower quantiles count: two free cores are needed, and
    on a shared machine only the best rounds have them.
    """
    benchmark.group = "gather"
    gathers, table = [fast(case), fast(case)], np.ones(len(case.items) // 2, np.int64)
    gathers[1].next = len(case.batches) // 2
    places = [random_places(len(table), seed) for seed in (1, 2)]
    arrays = (case.items, case.spans, case.batches)
    rounds = {"now": 0}

    def in_python(k: int) -> None:
        for _ in range(20):
            gathers[k]()

    def in_one_kernel(k: int) -> None:
        one = gathers[k]
        many_gathers(arrays, one.next, 20, (*one.parts, one.offsets, one.ids, one.out))
        one.next += 20

    def reads(k: int) -> None:
        first = rounds["now"] % 4 * 200_000
        read_at(table, places[k][first : first + 250_000])

    def multiply(k: int) -> None:
        arithmetic(3_000_000)

    jobs = {"gather": in_python, "in one kernel": in_one_kernel, "random reads": reads,
            "arithmetic": multiply}  # fmt: skip
    pair = Pair()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for job in jobs.values():
        pair(job)
    for now in range(3 if benchmark.disabled else 200):
        rounds["now"] = now
        for name, job in jobs.items():
            started = time.perf_counter()
            job(0)
            middle = time.perf_counter()
            pair(job)
            times[name].append((middle - started, time.perf_counter() - middle))
    pair.close()
    benchmark.pedantic(in_python, args=(0,), rounds=3, iterations=1)
    lines = []
    for name, pairs in times.items():
        one, two = np.array(pairs).T
        scaling = {f"q{q:02}": float(np.quantile(one, q / 100) / np.quantile(two, q / 100))
                   for q in (0, 5, 25, 50)}  # fmt: skip
        benchmark.extra_info[f"scaling, {name}"] = scaling
        shown = ", ".join(f"{key} {value:.3f}" for key, value in scaling.items())
        lines.append(f"scaling to two threads, {name}: {shown}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
