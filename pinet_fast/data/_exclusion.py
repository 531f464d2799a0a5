"""Which items the negatives of a batch must not be, as sorted lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pinet_fast.data import _njit_negatives
from pinet_fast.errors import DataError

if TYPE_CHECKING:
    from pinet_fast.data.store import SequenceStore

IntArray = npt.NDArray[np.int64]
Items = npt.NDArray[Any]  # int32 or int64

_MOST_MARKS = 64  # marks an item of the lists
_NO_ITEMS = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class Lists:
    """Excluded items: list ``numbers[b]`` is that of row b, or event t has ``items[t]`` alone.

    Attributes:
        items: Ascending items, one list after the other.
        offsets: Where the lists begin, and the end of the last one.
        numbers: The list of every row, int64 [B].
        is_own: Whether event t has ``items[t]`` alone.
    """

    items: Items
    offsets: IntArray
    numbers: IntArray
    is_own: bool = False

    @classmethod
    def by_row(cls, items: Items, offsets: IntArray) -> Lists:
        """Return a list for every row."""
        return cls(items, offsets, np.arange(len(offsets) - 1))

    @classmethod
    def empty(cls, num_rows: int) -> Lists:
        """Exclude nothing."""
        return cls(_NO_ITEMS, np.zeros(2, np.int64), np.zeros(num_rows, np.int64))

    @classmethod
    def own(
        cls, store: SequenceStore, targets: IntArray, offsets: IntArray, users: IntArray
    ) -> Lists:
        """Exclude from every event its target alone.

        Raises:
            DataError: There is no other item.
        """
        _refuse_full(store, store.num_items < 2, "the target is")
        return cls(targets, offsets, users, is_own=True)

    def united(self, store: SequenceStore) -> Lists:
        """Return the union of all lists as a single one.

        Raises:
            DataError: It holds every item.
        """
        if store.num_items < _MOST_MARKS * len(self.items):  # marking is faster than sorting
            is_there = np.zeros(store.num_items + 1, np.bool_)
            is_there[self.items] = True
            items = np.flatnonzero(is_there).astype(self.items.dtype)
        else:
            items = np.unique(self.items)
        return Lists.by_row(items, np.array([0, len(items)])).checked(store)

    def checked(self, store: SequenceStore) -> Lists:
        """Return the lists, unless one of them holds every item.

        Raises:
            DataError: One does.
        """
        full = bool((np.diff(self.offsets) >= store.num_items).any())
        _refuse_full(store, full, "the excluded items of one batch are")
        return self


def unique_lists(items: Items, starts: IntArray, ends: IntArray) -> tuple[Items, IntArray]:
    """Return the sorted unique items of every window, and the offsets of the lists."""
    out = np.empty(int((ends - starts).sum()), items.dtype)
    offsets = np.empty(len(starts) + 1, np.int64)
    _njit_negatives.unique_histories(items, starts, ends, out, offsets)
    return out[: offsets[-1]], offsets


def _refuse_full(store: SequenceStore, is_full: bool, what: str) -> None:
    if is_full:
        raise DataError(
            f"log {store.source}: {what} all {store.num_items:,} items of the catalogue, so no "
            "negative is left; use a smaller max_len or batch, or Negatives(exclude='none')"
        )
