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

MOST_TRIES = 16
"""Weighted draws that may meet an excluded item before the complement itself is drawn from."""

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


@njit(nogil=True, cache=True)
def unique_histories(
    items: Array, starts: Array, ends: Array, histories: Array, offsets: Array
) -> None:
    """Write the sorted unique items of every window one after the other, and where each begins."""
    end = 0
    offsets[0] = 0
    for u in range(starts.shape[0]):
        window = np.sort(items[starts[u] : ends[u]])
        last = -1
        for item in window:
            if item != last:
                histories[end] = item
                end += 1
                last = item
        offsets[u + 1] = end


@njit(nogil=True, cache=True)
def _unit(word: np.uint64) -> float:
    return np.float64(word >> _U11) * _ULP


@njit(nogil=True, cache=True)
def _first_above(values: Array, start: int, end: int, shift: int, rank: np.int64) -> int:
    # How many of the ascending values[start:end] have values[i] - shift - (i - start) <= rank.
    low, high = start, end
    while low < high:
        middle = (low + high) >> 1
        if values[middle] - shift - (middle - start) <= rank:
            low = middle + 1
        else:
            high = middle
    return low - start


@njit(nogil=True, cache=True)
def draw_uniform(
    excluded: Array,
    list_offsets: Array,
    lists: Array,
    is_own: bool,
    num_items: int,
    users: Array,
    first_positions: Array,
    offsets: Array,
    key: np.uint64,
    num_draws: int,
    out: Array,
    log_q: Array,
) -> None:
    """Draw ``num_draws`` items of 1..V for every event, none of them excluded.

    User b may not get the ascending items ``excluded[list_offsets[k]:list_offsets[k + 1]]`` with
    k = ``lists[b]``; where ``is_own``, event t may not get ``excluded[t]`` alone. A draw depends on
    (key, user, position of the event in the user's sequence, number of the draw) alone. Rank k of
    the complement of h_0 < h_1 < ... is item k + 1 + i, where i is the number of excluded items
    with h_i - 1 - i <= k: no draw is ever rejected. ``log_q`` gets the log-probability of every
    draw, unless it is empty.
    """
    has_log_q = log_q.shape[0] > 0
    for b in range(users.shape[0]):
        first = end = 0
        if not is_own:
            first, end = list_offsets[lists[b]], list_offsets[lists[b] + 1]
        user_key = _subkey(key, users[b])
        for t in range(offsets[b], offsets[b + 1]):
            if is_own:
                first, end = t, t + 1
            num_free = np.uint64(num_items - (end - first))
            event_key = _subkey(user_key, first_positions[b] + t - offsets[b])
            for j in range(num_draws):
                rank = _below(_subkey(event_key, j), num_free)
                out[t * num_draws + j] = rank + 1 + _first_above(excluded, first, end, 1, rank)
                if has_log_q:
                    log_q[t * num_draws + j] = -np.log(np.float64(num_free))


@njit(nogil=True, cache=True)
def count_items(items: Array, starts: Array, ends: Array, counts: Array) -> None:
    """Add to ``counts[v]`` how often item v occurs in the windows."""
    for u in range(starts.shape[0]):
        for i in range(starts[u], ends[u]):
            counts[items[i]] += 1


@njit(nogil=True, cache=True)
def alias_table(weights: Array, keep: Array, alias: Array) -> None:
    """Fill an alias table (Walker 1977, by Vose's method): O(n), and O(1) a draw.

    Column i yields i with probability ``keep[i]``, and ``alias[i]`` otherwise.
    """
    num = weights.shape[0]
    scale = num / weights.sum()
    small, large = np.empty(num, np.int64), np.empty(num, np.int64)
    num_small = num_large = 0
    for i in range(num):
        keep[i], alias[i] = weights[i] * scale, i
        if keep[i] < 1.0:
            small[num_small] = i
            num_small += 1
        else:
            large[num_large] = i
            num_large += 1
    while num_small and num_large:
        low, high = small[num_small - 1], large[num_large - 1]
        num_small -= 1
        alias[low] = high
        keep[high] -= 1.0 - keep[low]
        if keep[high] < 1.0:
            num_large -= 1
            small[num_small] = high
            num_small += 1
    # What is left is 1 but for rounding.
    for i in range(num_small):
        keep[small[i]] = 1.0
    for i in range(num_large):
        keep[large[i]] = 1.0


@njit(nogil=True, cache=True)
def _is_excluded(excluded: Array, first: int, end: int, item: np.int64) -> bool:
    low = first + np.searchsorted(excluded[first:end], item)
    return bool(low < end and excluded[low] == item)


@njit(nogil=True, cache=True)
def _excluded_mass(cumulative: Array, excluded: Array, first: int, end: int) -> float:
    mass = 0.0
    for i in range(first, end):
        mass += cumulative[excluded[i]] - cumulative[excluded[i] - 1]
    return mass


@njit(nogil=True, cache=True)
def complement_draw(
    cumulative: Array, excluded: Array, first: int, end: int, unit: float
) -> np.int64:
    """Return the item at share ``unit`` of the weight of all items that are not excluded.

    ``cumulative[v]`` is the weight of items 1..v. The gaps between excluded items are walked one
    by one, so the item lies inside a gap whatever the rounding.
    """
    num_items = cumulative.shape[0] - 1
    total, before = 0.0, 0
    for i in range(first, end + 1):
        item = excluded[i] if i < end else num_items + 1
        total += cumulative[item - 1] - cumulative[before]
        before = item
    left, before, found = unit * total, 0, np.int64(0)
    for i in range(first, end + 1):
        item = excluded[i] if i < end else num_items + 1
        mass = cumulative[item - 1] - cumulative[before]
        if item - 1 > before:
            goal = cumulative[before] + left
            place = np.searchsorted(cumulative[before + 1 : item], goal, side="right")
            found = np.int64(min(before + 1 + place, item - 1))
            if left < mass:
                return found
        left -= mass
        before = item
    return found


@njit(nogil=True, cache=True)
def draw_weighted(
    excluded: Array,
    list_offsets: Array,
    lists: Array,
    is_own: bool,
    cumulative: Array,
    keep: Array,
    alias: Array,
    users: Array,
    first_positions: Array,
    offsets: Array,
    key: np.uint64,
    num_draws: int,
    out: Array,
    log_q: Array,
) -> None:
    """Draw as ``draw_uniform`` does, item v with probability in proportion to its weight.

    An excluded item is drawn anew, ``MOST_TRIES`` times at most; then the item comes from the
    complement itself. Both give the same distribution, so the bound does not change it.
    """
    num_items = keep.shape[0]
    has_log_q = log_q.shape[0] > 0
    total = cumulative[num_items]
    for b in range(users.shape[0]):
        first = end = 0
        if not is_own:
            first, end = list_offsets[lists[b]], list_offsets[lists[b] + 1]
        free = total
        if has_log_q and not is_own:
            free = total - _excluded_mass(cumulative, excluded, first, end)
        user_key = _subkey(key, users[b])
        for t in range(offsets[b], offsets[b + 1]):
            if is_own:
                first, end = t, t + 1
                free = total - _excluded_mass(cumulative, excluded, first, end)
            event_key = _subkey(user_key, first_positions[b] + t - offsets[b])
            for j in range(num_draws):
                draw_key = _subkey(event_key, j)
                item = np.int64(0)
                for attempt in range(MOST_TRIES):
                    column = _below(_subkey(draw_key, 2 * attempt), np.uint64(num_items))
                    if _unit(_subkey(draw_key, 2 * attempt + 1)) >= keep[column]:
                        column = alias[column]
                    if not _is_excluded(excluded, first, end, column + 1):
                        item = column + 1
                        break
                if item == 0:
                    unit = _unit(_subkey(draw_key, 2 * MOST_TRIES))
                    item = complement_draw(cumulative, excluded, first, end, unit)
                out[t * num_draws + j] = item
                if has_log_q:
                    weight = cumulative[item] - cumulative[item - 1]
                    log_q[t * num_draws + j] = np.log(weight / max(free, weight))
