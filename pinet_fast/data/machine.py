"""Measures what bounds the data path on this machine: copy bandwidth and random cache lines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

_LINE = 8  # int64 in a cache line of 64 bytes
_ARRAY_BYTES = 256 << 20  # far beyond any cache
_BATCH_BYTES = 1 << 19
_LOOKUPS = 1 << 20
_TRIES = 5
# An int64 pair of offsets touches 1.125 lines on average, the values begin in one more.
_LINES_PER_ROW = 2.125
_ITEM_BYTES = 4


@dataclass(frozen=True)
class Machine:
    """What memory does here, best of five tries on one thread.

    Attributes:
        copy_gb_per_s: Copying cold values into a buffer the size of a batch, GB/s of values.
        random_line_ns: Time of one of many independent reads of random cache lines.
    """

    copy_gb_per_s: float
    random_line_ns: float

    def floor_ns_per_row(self, events: float) -> float:
        """Return the least time in which one thread can gather a row of so many item codes."""
        return _LINES_PER_ROW * self.random_line_ns + events * _ITEM_BYTES / self.copy_gb_per_s


def measure() -> Machine:
    """Measure this machine; takes about two seconds and 256 MB."""
    from numba import njit  # type: ignore[import-untyped,unused-ignore]

    values = np.ones(_ARRAY_BYTES // 8, np.int64)
    lines = np.random.default_rng(0).permutation(len(values) // _LINE)[:_LOOKUPS] * _LINE
    read = njit(nogil=True)(_sum_at)
    read(values, lines[:1])
    random_s = _best(lambda: read(values, lines))
    buffer = np.empty(_BATCH_BYTES // 8, np.int64)
    copy_s = _best(lambda: _copy_through(values, buffer))
    return Machine(values.nbytes / copy_s / 1e9, random_s / len(lines) * 1e9)


def _sum_at(values: npt.NDArray[Any], places: npt.NDArray[Any]) -> int:
    total = 0
    for i in range(places.shape[0]):
        total += values[places[i]]
    return total


def _copy_through(values: npt.NDArray[Any], buffer: npt.NDArray[Any]) -> None:
    for start in range(0, len(values), len(buffer)):
        buffer[:] = values[start : start + len(buffer)]


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
