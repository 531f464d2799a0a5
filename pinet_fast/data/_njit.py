"""Numba kernels of the data path: single-threaded, without the GIL, one-dimensional arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

# Increment and multipliers of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
# generators, OOPSLA 2014). Everything is np.uint64: Numba turns int64 with uint64 into float64.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_A = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_B = np.uint64(0x94D049BB133111EB)
_U1, _U11, _U27, _U30 = np.uint64(1), np.uint64(11), np.uint64(27), np.uint64(30)
_U31, _U32 = np.uint64(31), np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)

SPAN_BITS = 16
"""Bits of a span's second word that hold the stratum."""

TAIL, RANDOM_WINDOW, PREFIX = 0, 1, 2

_ULP = 2.0**-53


@njit(nogil=True, cache=True)
def _mix(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> _U30)) * _FACTOR_A
    x = (x ^ (x >> _U27)) * _FACTOR_B
    return x ^ (x >> _U31)


@njit(nogil=True, cache=True)
def _subkey(key: np.uint64, counter: int) -> np.uint64:
    return _mix(key + (np.uint64(counter) + _U1) * _STEP)


@njit(nogil=True, cache=True)
def _below(word: np.uint64, bound: np.uint64) -> np.int64:
    # floor(word * bound / 2**64) for bound < 2**32: biased by less than bound / 2**64.
    high = (word >> _U32) * bound
    low = ((word & _LOW) * bound) >> _U32
    return np.int64((high + low) >> _U32)


@njit(nogil=True, cache=True)
def _unit(word: np.uint64) -> float:
    return np.float64(word >> _U11) * _ULP


@njit(nogil=True, cache=True)
def plan_user(
    spans: Array,
    user: int,
    crop: int,
    window: int,
    shift: int,
    key: np.uint64,
    b: int,
    starts: Array,
    ends: Array,
    positions: Array,
    offsets: Array,
    ids: Array,
) -> None:
    """Choose the window of one user; see ``plan``."""
    start, word = spans[2 * user], spans[2 * user + 1]
    length = word >> SPAN_BITS
    end = start + length
    if crop == RANDOM_WINDOW and length > window:
        end = start + window + _below(_subkey(key, user), np.uint64(length - window + 1))
    elif crop == PREFIX and length > shift + 1:
        end = start + shift + 1 + _below(_subkey(key, user), np.uint64(length - shift))
    first = max(start, end - window)
    starts[b], ends[b], positions[b] = first, end, first - start
    offsets[b + 1] = offsets[b] + max(end - first - shift, 0)
    ids[b] = word & ((1 << SPAN_BITS) - 1)


@njit(nogil=True, cache=True)
def plan(
    spans: Array,
    users: Array,
    crop: int,
    window: int,
    shift: int,
    key: np.uint64,
    starts: Array,
    ends: Array,
    positions: Array,
    offsets: Array,
    ids: Array,
) -> None:
    """Choose a window of at most ``window`` training events for every user.

    ``spans[2u]`` is where user u begins, and ``spans[2u + 1]`` holds the number of the user's
    training events and, in its low ``SPAN_BITS`` bits, the stratum: one memory line a user. The
    window is ``starts[b]`` to ``ends[b]``, and begins at event ``positions[b]`` of the user.
    Values are all its events but the last ``shift``; ``offsets`` are theirs.
    """
    offsets[0] = 0
    for b in range(users.shape[0]):
        plan_user(
            spans, users[b], crop, window, shift, key, b, starts, ends, positions, offsets, ids
        )


@njit(nogil=True, cache=True)
def gather(items: Array, starts: Array, ends: Array, offsets: Array, out: Array) -> None:
    """Copy ``items[starts[b]:ends[b]]`` to ``out[offsets[b]:offsets[b + 1]]`` for every b."""
    for b in range(starts.shape[0]):
        shift = offsets[b] - starts[b]
        for i in range(starts[b], ends[b]):
            out[i + shift] = items[i]


@njit(nogil=True, cache=True)
def gather_next(
    items: Array, starts: Array, ends: Array, offsets: Array, values: Array, targets: Array
) -> None:
    """Split windows of L + 1 events into L values and, one place on, their L targets."""
    for b in range(starts.shape[0]):
        shift = offsets[b] - starts[b]
        for i in range(starts[b], ends[b] - 1):
            values[i + shift] = items[i]
            targets[i + shift] = items[i + 1]
