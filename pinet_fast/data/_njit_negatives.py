# mypy: disallow-untyped-decorators=false
"""Numba kernels that draw negatives: single-threaded, without the GIL, one-dimensional arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from pinet_fast.data._njit import _below, _subkey, _unit

Array = npt.NDArray[Any]

MOST_TRIES = 16
"""Weighted draws that may meet an excluded item before the complement itself is drawn from."""

DRAWS_PER_ENTRY = 16
"""A table for a list pays if the list has fewer items than that many times the draws."""


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
def _num_before(excluded: Array, first: int, end: int, rank: np.int64) -> int:
    # How many excluded items have at most ``rank`` free items before them.
    low, high = first, end
    while low < high:
        middle = (low + high) >> 1
        if excluded[middle] - 1 - (middle - first) <= rank:
            low = middle + 1
        else:
            high = middle
    return low - first


@njit(nogil=True, cache=True)
def _fill_table(excluded: Array, first: int, end: int, top: int, step: int, table: Array) -> int:
    """Count, for runs of 2**shift keys 0..top, the excluded items before each; return the shift.

    The key of an item is itself (``step`` 0), or how many free items come before it (1). There are
    about twice as many runs as excluded items, so that an even key has half an item in its run on
    average, wherever the items are.
    """
    num = end - first
    shift = 0
    while (top >> shift) >= 2 * num:
        shift += 1
    size = (top >> shift) + 2
    table[:size] = 0
    for i in range(num):
        # Inside 0..top unless a store that was opened unchecked is damaged: then no harm is done.
        key = min(max(excluded[first + i] - step * (1 + i), 0), top)
        table[(key >> shift) + 1] += 1
    for run in range(1, size):
        table[run] += table[run - 1]
    return shift


@njit(nogil=True, cache=True)
def _table_size(list_offsets: Array, lists: Array, is_own: bool) -> int:
    most = 0
    if not is_own:
        for row in lists:
            most = max(most, list_offsets[row + 1] - list_offsets[row])
    return 2 * most + 2


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
    table = np.empty(_table_size(list_offsets, lists, is_own), np.int32)
    for b in range(users.shape[0]):
        first = end = 0
        if not is_own:
            first, end = list_offsets[lists[b]], list_offsets[lists[b] + 1]
        user_key = _subkey(key, users[b])
        num_draws_of_user = (offsets[b + 1] - offsets[b]) * num_draws
        has_table = not is_own and num_draws_of_user * DRAWS_PER_ENTRY > end - first > 0
        shift = 0
        if has_table:
            shift = _fill_table(excluded, first, end, num_items - (end - first), 1, table)
        for t in range(offsets[b], offsets[b + 1]):
            if is_own:
                first, end = t, t + 1
            num_free = np.uint64(num_items - (end - first))
            event_key = _subkey(user_key, first_positions[b] + t - offsets[b])
            for j in range(num_draws):
                rank = _below(_subkey(event_key, j), num_free)
                if has_table:
                    before = int(table[rank >> shift])
                    while first + before < end and excluded[first + before] - 1 - before <= rank:
                        before += 1
                else:
                    before = _num_before(excluded, first, end, rank)
                out[t * num_draws + j] = rank + 1 + before
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
    low, high = first, end
    while low < high:
        middle = (low + high) >> 1
        if excluded[middle] < item:
            low = middle + 1
        else:
            high = middle
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
    table = np.empty(_table_size(list_offsets, lists, is_own), np.int32)
    for b in range(users.shape[0]):
        first = end = 0
        if not is_own:
            first, end = list_offsets[lists[b]], list_offsets[lists[b] + 1]
        free = total
        if has_log_q and not is_own:
            free = total - _excluded_mass(cumulative, excluded, first, end)
        user_key = _subkey(key, users[b])
        num_draws_of_user = (offsets[b + 1] - offsets[b]) * num_draws
        has_table = not is_own and num_draws_of_user * DRAWS_PER_ENTRY > end - first > 0
        shift = 0
        if has_table:
            shift = _fill_table(excluded, first, end, num_items, 0, table)
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
                    low, high = first, end
                    if has_table:
                        run = (column + 1) >> shift
                        low, high = first + table[run], first + table[run + 1]
                    if not _is_excluded(excluded, low, high, column + 1):
                        item = column + 1
                        break
                if item == 0:
                    unit = _unit(_subkey(draw_key, 2 * MOST_TRIES))
                    item = complement_draw(cumulative, excluded, first, end, unit)
                out[t * num_draws + j] = item
                if has_log_q:
                    weight = cumulative[item] - cumulative[item - 1]
                    log_q[t * num_draws + j] = np.log(weight / max(free, weight))
