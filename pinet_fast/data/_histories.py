# mypy: disallow-untyped-decorators=false
"""The history of every user as sorted items: what negatives avoid and evaluation masks.

For every user the store holds the distinct items in ascending order and, with each, the place of
its first event. An item belongs to the first ``count`` events exactly if that place is below
``count``. So one pair of columns serves every split and every held-out event, memory-mapped: the
history up to any event is a filter of a list that is sorted already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numba import njit

from pinet_fast.data._prefetch import SPAN_AHEAD, VALUE_AHEAD, _ask, _ask_window, with_fallback

if TYPE_CHECKING:
    from collections.abc import Iterator

IntArray = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

_LOW = np.int64(0xFFFFFFFF)


@dataclass(frozen=True, eq=False)
class Histories:
    """Sorted distinct items of U users; read-only views of a mapped file.

    Attributes:
        offsets: int64 [U + 1]; user ``u`` owns entries ``offsets[u]`` to ``offsets[u + 1]``.
        items: Item codes, ascending in every list, int32 [D].
        firsts: Place of the item's first event among the user's events, from 0, int32 [D].
    """

    offsets: IntArray
    items: npt.NDArray[np.int32]
    firsts: npt.NDArray[np.int32]

    def before(self, users: IntArray, counts: IntArray) -> tuple[Array, IntArray]:
        """Return the sorted distinct items of the first events of users.

        Args:
            users: Row numbers of the store, int64 [B].
            counts: How many events of each count, int64 [B].

        Returns:
            The items of the lists one after the other, a new int32 array, and where each list
            begins, int64 [B + 1].
        """
        out = np.empty(int((self.offsets[users + 1] - self.offsets[users]).sum()), np.int32)
        borders = np.empty(len(users) + 1, np.int64)
        before(self.items, self.firsts, self.offsets, users, counts, out, borders)
        return out[: borders[-1]], borders

    def full_users(self, num_items: int, counts: IntArray) -> IntArray:
        """Return the users whose first ``counts[u]`` events hold ``num_items`` items or more."""
        largest = np.flatnonzero(np.diff(self.offsets) >= num_items)
        borders = self.before(largest, counts[largest])[1]
        full: IntArray = largest[np.diff(borders) >= num_items]
        return full


def histories_of(
    items: Array, offsets: IntArray, events_at_once: int = 1 << 22
) -> Iterator[tuple[IntArray, Array, Array]]:
    """Yield the histories of all users, whole users at a time.

    Memory holds ``events_at_once`` events, or those of the most active user.

    Args:
        items: Item codes, int32 [E].
        offsets: int64 [U + 1].
        events_at_once: Events of a part, about.

    Returns:
        An iterator over (lengths of the lists, items, first places) of the next users.
    """
    first, num_users = 0, len(offsets) - 1
    while first < num_users:
        limit = offsets[first] + events_at_once
        last = max(first + 1, int(np.searchsorted(offsets, limit, side="right")) - 1)
        own = offsets[first : last + 1]
        size = int(own[-1] - own[0])
        found, places = np.empty(size, np.int32), np.empty(size, np.int32)
        borders = np.empty(len(own), np.int64)
        first_events(items[own[0] : own[-1]], own - own[0], found, places, borders)
        yield np.diff(borders), found[: borders[-1]], places[: borders[-1]]
        first = last


@njit(nogil=True, cache=True)
def first_events(
    items: Array, offsets: IntArray, found: Array, places: Array, borders: IntArray
) -> None:
    """Write the sorted distinct items of every list, and the place of the first of each in it."""
    end = 0
    borders[0] = 0
    for u in range(offsets.shape[0] - 1):
        start = offsets[u]
        # Item in the high half, place in the low half: one sort gives both in order.
        keys = np.empty(offsets[u + 1] - start, np.int64)
        for i in range(keys.shape[0]):
            keys[i] = np.int64(items[start + i]) << 32 | i
        keys.sort()
        last = np.int64(-1)
        for key in keys:
            if key >> 32 != last:
                last = key >> 32
                found[end], places[end] = last, key & _LOW
                end += 1
        borders[u + 1] = end


@njit(nogil=True, cache=True)
def before_plain(
    items: Array,
    firsts: Array,
    offsets: IntArray,
    users: IntArray,
    counts: IntArray,
    out: Array,
    borders: IntArray,
) -> None:
    """Copy the items whose first place is below ``counts[b]`` from the list of ``users[b]``."""
    end = 0
    borders[0] = 0
    for b in range(users.shape[0]):
        count = counts[b]
        for i in range(offsets[users[b]], offsets[users[b] + 1]):
            out[end] = items[i]  # overwritten by the next one unless it counts
            end += firsts[i] < count
        borders[b + 1] = end


@njit(nogil=True, cache=True)
def _before(
    items: Array,
    firsts: Array,
    offsets: IntArray,
    users: IntArray,
    counts: IntArray,
    out: Array,
    borders: IntArray,
) -> None:
    # Unsigned places: Numba makes a negative one count from the end, at a cost in every round.
    end, last = np.uint64(0), users.shape[0] - 1
    borders[0] = 0
    for b in range(users.shape[0]):
        _ask(offsets, users[min(b + SPAN_AHEAD, last)])
        later = users[min(b + VALUE_AHEAD, last)]
        _ask_window(items, offsets, offsets[1:], later)
        _ask_window(firsts, offsets, offsets[1:], later)
        count = counts[b]
        for i in range(np.uint64(offsets[users[b]]), np.uint64(offsets[users[b] + 1])):
            out[end] = items[i]
            end += np.uint64(firsts[i] < count)
        borders[b + 1] = end


before = with_fallback(_before, before_plain)
