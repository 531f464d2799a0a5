"""Cutting and copying the windows of a batch: against a plain loop, copying, and other builders.

1.5 million users whose lengths follow a Pareto(1.1) law cut to 2..5000 events, batches of 4096,
the last 200 events of each. The other builders are written here after what their libraries do.
"""

from __future__ import annotations

import ctypes
import itertools
import queue
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numba import njit

from pinet_fast.data import _njit, _prefetch
from pinet_fast.data.floor import MemoryFloor, random_places, read_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NUM_USERS, NUM_ITEMS, BATCH, MAX_LEN = 1_500_000, 100_000, 4096, 200
KEY = np.uint64(0)


@dataclass(frozen=True)
class Case:
    """The sequences and the batches of users.

    Attributes:
        items: int32 [E].
        offsets: int64 [U + 1].
        spans: What the plan reads, int64 [2 U].
        batches: Users, int64 [360, 4096], none of them twice: memory, not caches, is measured.
    """

    items: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray
    batches: np.ndarray


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(0)
    lengths = np.clip((rng.pareto(1.1, NUM_USERS) + 1) * 8, 2, 5000).astype(np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    spans = np.empty(2 * NUM_USERS, np.int64)
    spans[::2], spans[1::2] = offsets[:-1], lengths << _njit.SPAN_BITS
    items = rng.integers(1, NUM_ITEMS, offsets[-1], dtype=np.int32)
    return Case(
        items, offsets, spans, rng.permutation(NUM_USERS)[: 360 * BATCH].reshape(360, BATCH)
    )


class Gather:
    """Calls a pair of kernels on one batch after the other, into the same memory."""

    def __init__(
        self, case: Case, plan: Callable[..., None], gather: Callable[..., None], first: int = 0
    ) -> None:
        self.case, self.plan, self.gather = case, plan, gather
        self.parts = [np.empty(BATCH, np.int64) for _ in range(3)]
        self.offsets, self.ids = np.empty(BATCH + 1, np.int64), np.empty(BATCH, np.int64)
        self.out = np.empty(BATCH * MAX_LEN, np.int32)
        self.next = first

    def batch(self, users: np.ndarray) -> np.ndarray:
        """Return the events of the windows of some users."""
        starts, ends, positions = self.parts
        self.plan(
            self.case.spans, users, _njit.TAIL, MAX_LEN, 0, KEY,
            starts, ends, positions, self.offsets, self.ids,
        )  # fmt: skip
        self.gather(self.case.items, starts, ends, self.offsets, self.out)
        return self.out[: self.offsets[-1]]

    def __call__(self) -> None:
        """Gather the next batch."""
        self.batch(self.case.batches[self.next % len(self.case.batches)])
        self.next += 1


def fast(case: Case) -> Gather:
    return Gather(case, _prefetch.plan, _prefetch.gather)


FAR = 180  # batches ahead of the other, who must not find the lines that the first one read
STREAM = 20  # batches in a turn: a loader builds one after the other, and caches are warm for it


class Stream:
    """A turn of a pair: several batches in a row, the processor time of each taken.

    On a machine that does other work, the longer of two turns is interrupted more often.
    """

    def __init__(self, build: Callable[[], object]) -> None:
        self.build = build
        self.times: list[float] = []

    def __call__(self) -> None:
        """Build the batches of one turn."""
        for _ in range(STREAM):
            started = time.thread_time()
            self.build()
            self.times.append(time.thread_time() - started)


def compared(
    mine: Callable[[], object], other: Callable[[], object], paired: Callable[..., Any],
    benchmark: Any, capsys: Any, rounds: int,
) -> None:  # fmt: skip
    """Measure in pairs of turns, and by the median processor time of single batches."""
    one, two = Stream(mine), Stream(other)
    paired(one, two, rounds=rounds)
    us, other_us = (float(np.median(s.times[STREAM:])) * 1e6 for s in (one, two))
    benchmark.extra_info.update(batch_us=us, other_batch_us=other_us)
    with capsys.disabled():
        print(
            f"  processor time of a batch: {us:.0f} us, the other {other_us:.0f} us, "
            f"ratio {us / other_us:.4f}"
        )


def windows(case: Case, users: np.ndarray) -> list[np.ndarray]:
    begins, ends = case.offsets[users], case.offsets[users + 1]
    starts = np.maximum(begins, ends - MAX_LEN)
    return [case.items[a:b] for a, b in zip(starts, ends, strict=True)]


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


def padded_from_lists(sequences: list[list[int]], users: np.ndarray) -> torch.Tensor:
    """RecTools' way: Python lists, a float64 matrix filled row by row, then integers."""
    out = np.zeros((len(users), MAX_LEN))
    for b, user in enumerate(users.tolist()):
        row = sequences[user][-MAX_LEN:]
        out[b, -len(row) :] = row
    return torch.LongTensor(out)


def test_gather_over_rectools_style(
    case: Case, paired: Callable[..., Any], benchmark: Any, capsys: Any
) -> None:
    benchmark.group = "gather"
    theirs = case.batches[FAR : FAR + 20]
    sequences = {
        user: window.tolist()
        for users in theirs
        for user, window in zip(users.tolist(), windows(case, users), strict=True)
    }
    mine, turn = fast(case), itertools.cycle(theirs)
    rows = padded_from_lists(sequences, theirs[0])
    assert (rows[rows > 0].numpy() == mine.batch(theirs[0])).all()
    compared(
        mine, lambda: padded_from_lists(sequences, next(turn)), paired, benchmark, capsys, rounds=15
    )


def padded_by_mask(items: torch.Tensor, offsets: torch.Tensor, users: torch.Tensor) -> Any:
    """RePlay's way: a mask of the padded rectangle, one take, one where."""
    ends = offsets[users + 1]
    lengths = torch.minimum(ends - offsets[users], torch.tensor(MAX_LEN))
    column = torch.arange(MAX_LEN)
    mask = column >= MAX_LEN - lengths.unsqueeze(1)
    places = ends.unsqueeze(1) - MAX_LEN + column
    return torch.where(mask, torch.take(items, places.clamp_(min=0)), 0), mask


def test_gather_over_replay_style(
    case: Case, paired: Callable[..., Any], benchmark: Any, capsys: Any
) -> None:
    benchmark.group = "gather"
    mine, turn = fast(case), itertools.cycle(torch.from_numpy(case.batches[FAR:]))
    users = next(turn)
    items, offsets = torch.from_numpy(case.items), torch.from_numpy(case.offsets)
    rows, mask = padded_by_mask(items, offsets, users)
    assert (rows[mask].numpy() == mine.batch(users.numpy())).all()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compared(
            mine,
            lambda: padded_by_mask(items, offsets, next(turn)),
            paired,
            benchmark,
            capsys,
            rounds=30,
        )
    finally:
        torch.set_num_threads(threads)


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
