"""The least time that memory allows for gathering a batch, and how near a measurement comes.

Of every user a batch reads one line of the offsets (an int64 pair spans 1.125 lines of 64 bytes on
average) and one line of each gathered column at a random place, and copies the rest in order::

    floor = sum over users of (1.125 + C) * line_seconds + events * b / copy_rate

with C columns and b bytes of an event over all columns. ``line_seconds`` is the cost of one of
many independent random reads, ``copy_rate`` bytes a second of copying a batch; both are measured
on the machine. eta = floor / measured time is at most about 1.
"""

# mypy: disallow-untyped-decorators=false

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from pinet_fast.data import _njit, _prefetch

LINES_OF_OFFSETS = 1.125
_LINE = 64  # bytes
_TRIES = 5
_BLOCKS = 16  # copied in one piece
_FREE = 0.1  # share of the pieces that nothing interrupts, on a machine that is in use

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class MemoryFloor:
    """What a random line and a copied byte cost on this machine.

    Attributes:
        line_seconds: Seconds of one of many independent random reads.
        copy_rate: Bytes a second of copying blocks of the size of a batch out of a large table.
    """

    line_seconds: float
    copy_rate: float

    @classmethod
    def measure(
        cls, *, table_bytes: int = 256 << 20, copy_bytes: int = 1 << 19, seed: int = 0
    ) -> MemoryFloor:
        """Measure both, in parts of a millisecond: the best count, as other work interrupts some.

        Args:
            table_bytes: Size of the table that is read at random; far above the caches.
            copy_bytes: Size of the copied block.
            seed: Decides the places.

        Returns:
            The costs.
        """
        table = np.ones(table_bytes // 8, np.int64)
        tries = np.array_split(random_places(len(table), seed), _TRIES)
        target = np.empty(copy_bytes // 8, np.int64)
        read_at(table, tries[0][:8])  # compiles
        # Other places every time: lines that were read before are in a cache.
        lines = [_seconds(read_at, table, places) / len(places) for places in tries]
        pieces = [piece for _ in range(_TRIES) for piece in _pieces(table, len(target))]
        copies = [_seconds(_copy, piece, target) / piece.nbytes for piece in pieces]
        return cls(min(lines), 1 / float(np.quantile(copies, _FREE)))

    def seconds(self, users: int, events: int, *, event_bytes: int = 4, columns: int = 1) -> float:
        """Return the least time for a batch on one thread.

        Args:
            users: B.
            events: T, after cutting.
            event_bytes: Bytes of an event over all columns.
            columns: Gathered columns, C.
        """
        lines = users * (LINES_OF_OFFSETS + columns)
        return lines * self.line_seconds + events * event_bytes / self.copy_rate


@dataclass(frozen=True)
class GatherSpeed:
    """How near the floor the gather of this package comes on this machine, on one thread.

    Attributes:
        eta: Floor over measured time; 1 would be the floor itself.
        row_seconds: Seconds a user.
        mean_events: Events of a user, on average.
    """

    eta: float
    row_seconds: float
    mean_events: float

    @classmethod
    def measure(
        cls, floor: MemoryFloor, *, table_bytes: int = 256 << 20, batch_size: int = 4096,
        seed: int = 0,
    ) -> GatherSpeed:  # fmt: skip
        """Gather batches of users with 1 to 59 events; the best tenth of the batches counts.

        Args:
            floor: The costs, measured on this machine.
            table_bytes: Size of the events; far above the caches.
            batch_size: Users of a batch.
            seed: Decides lengths and users.
        """
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 60, table_bytes // 4 // 30)
        ends = np.cumsum(lengths)
        items = np.ones(ends[-1], np.int32)
        spans = np.empty(2 * len(lengths), np.int64)
        spans[::2], spans[1::2] = ends - lengths, lengths << _njit.SPAN_BITS
        num = min(100, len(lengths) // batch_size)
        batches = rng.permutation(len(lengths))[: num * batch_size].reshape(num, batch_size)
        starts, last, positions, ids = (np.empty(batch_size, np.int64) for _ in range(4))
        offsets, out = np.empty(batch_size + 1, np.int64), np.empty(60 * batch_size, np.int32)
        found = []
        for users in batches:
            began = time.perf_counter()
            _prefetch.plan(
                spans, users, _njit.TAIL, 200, 0, np.uint64(0),
                starts, last, positions, offsets, ids,
            )  # fmt: skip
            _prefetch.gather(items, starts, last, offsets, out)
            seconds = time.perf_counter() - began
            found.append((seconds, floor.seconds(batch_size, int(offsets[-1])) / seconds))
        times, etas = np.array(found[1:]).T  # the first one compiles
        return cls(
            float(np.quantile(etas, 0.9)),
            float(np.quantile(times, 0.1)) / batch_size,
            float(lengths.mean()),
        )


def random_places(num_values: int, seed: int = 0, count: int = 1 << 20) -> npt.NDArray[np.int64]:
    """Return random indices of int64 values, no two in one line of memory.

    Args:
        num_values: Length of the table.
        seed: Decides the places.
        count: Places at most; fewer where the table has fewer lines.
    """
    per_line = _LINE // 8
    lines = np.random.default_rng(seed).permutation(num_values // per_line)[:count]
    return lines * per_line


@njit(nogil=True, cache=True)
def read_at(table: Array, places: Array) -> int:
    """Add up the table at the places: independent reads that may overlap."""
    total = np.int64(0)
    for i in range(places.shape[0]):
        # Unsigned: Numba makes a negative place one from the end, and that alone took as long as
        # the reads on one machine.
        total += table[np.uint64(places[i])]
    return int(total)


def _pieces(table: Array, block: int) -> list[Array]:
    """Cut a table into pieces of some whole blocks; at least one."""
    size = min(_BLOCKS, len(table) // block) * block
    return [table[first : first + size] for first in range(0, len(table) - size + 1, size)]


def _copy(table: Array, target: Array) -> None:
    """Copy the table block by block to the same place, as a batch is: out of memory, not caches."""
    size = len(target)
    for first in range(0, len(table) - size + 1, size):
        np.copyto(target, table[first : first + size])


def _seconds(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started
