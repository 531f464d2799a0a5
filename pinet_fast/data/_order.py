# mypy: disallow-untyped-decorators=False
"""Keyed random permutations of any size, without memory: any place of any of them at once.

A permutation of [0, n) is a Feistel network on the smallest 2**w >= n numbers, whose halves differ
by at most one bit, walked until it lands below n. The round function is the output function of
SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) on
consecutive stretches of its sequence, one a round. Everything is np.uint64: Numba turns int64 with
uint64 into float64.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

IntArray = npt.NDArray[np.int64]

ROUNDS = 6
"""Rounds of the network: four leave pairs half of n apart unevenly spread (tests/data)."""

ROUNDS_SHORT = 24
"""Rounds where 2**w <= 256: there the halves are so short that six leave single places uneven."""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = np.uint64(_GOLDEN)
_FACTOR_A = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_B = np.uint64(0x94D049BB133111EB)
_U0, _U1, _U2, _U8 = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(8)
_U27, _U30, _U31, _U32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


def order(seed: int, stratum: int, cycle: int, n: int, positions: IntArray) -> IntArray:
    """Return what stands at some positions of a permutation of [0, n).

    Args:
        seed: An integer >= 0 of any size.
        stratum: The permutation is another one for every stratum,
        cycle: and in every cycle of a stratum.
        n: Size of the permutation, up to 2**62.
        positions: Places in it, int64 [B], each below n.

    Returns:
        Numbers below n, int64 [B]; over all n positions, each number once.
    """
    out = np.empty(len(positions), np.int64)
    _permute(np.uint64(_key(seed, stratum, cycle)), n, positions, out)
    return out


def order_within(
    seed: int, stratum: int, cycle: int, segments: IntArray, sizes: IntArray, positions: IntArray
) -> IntArray:
    """Return what stands at some positions of the permutations of segments of a stratum.

    Args:
        seed: As in ``order``.
        stratum: As in ``order``.
        cycle: As in ``order``.
        segments: Numbers of segments, int64 [B]; each has a permutation of its own.
        sizes: Sizes of these segments, int64 [B].
        positions: Places inside the segments, int64 [B], each below the size.

    Returns:
        Places inside the segments, int64 [B].
    """
    out = np.empty(len(positions), np.int64)
    _permute_within(np.uint64(_key(seed, stratum, cycle)), segments, sizes, positions, out)
    return out


@functools.lru_cache(maxsize=1024)
def _key(seed: int, stratum: int, cycle: int) -> int:
    limbs = [seed >> shift & _MASK for shift in range(0, max(seed.bit_length(), 1), 64)]
    key = 0
    for part in (*limbs, stratum, cycle):
        key = key + (part + 1) * _GOLDEN & _MASK
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _MASK
        key ^= key >> 31
    return key


@njit(nogil=True, cache=True)
def _mix(x: Any) -> Any:
    x = (x ^ (x >> _U30)) * _FACTOR_A
    x = (x ^ (x >> _U27)) * _FACTOR_B
    return x ^ (x >> _U31)


@njit(nogil=True, cache=True)
def _width(n: Any) -> Any:
    width = _U0
    while n > _U1 << width:
        width += _U1
    return width


@njit(nogil=True, cache=True)
def _walk(key: Any, n: Any, width: Any, x: Any) -> Any:
    low_width = width >> _U1
    low_mask = (_U1 << low_width) - _U1
    high_mask = (_U1 << (width - low_width)) - _U1
    pairs = ROUNDS // 2 if width > _U8 else ROUNDS_SHORT // 2
    while True:
        high, low, round_key = x >> low_width, x & low_mask, key
        for _ in range(pairs):
            high ^= (_mix(round_key + low) >> _U32) & high_mask
            low ^= (_mix(round_key + _STEP + high) >> _U32) & low_mask
            round_key += _U2 * _STEP
        x = high << low_width | low
        if x < n:
            return x


@njit(nogil=True, cache=True)
def _permute(key: Any, n: int, positions: IntArray, out: IntArray) -> None:
    size = np.uint64(n)
    width = _width(size)
    for b in range(positions.shape[0]):
        out[b] = np.int64(_walk(key, size, width, np.uint64(positions[b])))


@njit(nogil=True, cache=True)
def _permute_within(
    key: Any, segments: IntArray, sizes: IntArray, positions: IntArray, out: IntArray
) -> None:
    for b in range(positions.shape[0]):
        size = np.uint64(sizes[b])
        own = _mix(key + (np.uint64(segments[b]) + _U1) * _STEP)
        out[b] = np.int64(_walk(own, size, _width(size), np.uint64(positions[b])))
