"""What the benchmarks of the gather share: the sequences, the kernels in turn, measured turns.

1.5 million users whose lengths follow a Pareto(1.1) law cut to 2..5000 events, batches of 4096,
the last 200 events of each.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pinet_fast.data import _njit, _prefetch

if TYPE_CHECKING:
    from collections.abc import Callable

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
