# mypy: disallow-untyped-decorators=false
"""Applies augmentations to the windows of a batch, as lists of indices into the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numba import njit

from pinet_fast.data._njit import _below, _subkey, _unit
from pinet_fast.data.augment import Augmentation, Crop, Drop, Mask, Reorder

if TYPE_CHECKING:
    from collections.abc import Sequence

IntArray = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

CROP, MASK, REORDER, DROP = range(4)
SHOWN = -1
"""In place of a mask token: the event itself is shown."""

_KINDS = {Crop: CROP, Mask: MASK, Reorder: REORDER, Drop: DROP}
_STREAM = 5  # parts these numbers from crops (2) and negatives (1, 3, 4) under the same seed
_ROUNDING = 1e-9  # keeps 0.7 of 10 events 7 events


@dataclass(frozen=True, eq=False)
class Sources:
    """Where the events of a batch come from.

    Attributes:
        places: Index into ``store.items`` of every event, int64 [T].
        tokens: What is shown in its place, or ``SHOWN``, int64 [T].
        offsets: Ragged offsets, int64 [B + 1].
    """

    places: IntArray
    tokens: IntArray
    offsets: IntArray

    def gather(self, items: Array, values: IntArray, targets: IntArray | None) -> None:
        """Write the values and, for ``targets="next"`` and ``"last"``, their targets.

        Targets are int64 [T] or [B]; the target of an event is the one after it in the store.
        """
        nothing = values[:0]
        _gather(
            items, self.places, self.tokens, self.offsets, values,
            nothing if targets is None else targets,
        )  # fmt: skip


class Augmenter:
    """Augments batches.

    Args:
        chain: Checked augmentations, in the order in which they are applied.
        seed: Decides, with the epoch, what every user gets.
    """

    def __init__(self, chain: Sequence[Augmentation], seed: int) -> None:
        self._seed = seed
        self._kinds = np.array([_KINDS[type(one)] for one in chain], np.int64)
        self._shares = np.array([one.share for one in chain], np.float64)
        self._tokens = np.array([getattr(one, "token", SHOWN) for one in chain], np.int64)

    def sources(
        self, epoch: int, users: IntArray, starts: IntArray, ends: IntArray, positions: IntArray
    ) -> Sources:
        """Augment the windows of users.

        Args:
            epoch: From 0.
            users: Row numbers of the store, int64 [B].
            starts: Where the windows begin in ``store.items``, int64 [B].
            ends: Where they end, without what is a target only, int64 [B].
            positions: Position of each window's first event among the user's, int64 [B].
        """
        keys = np.random.SeedSequence(self._seed, spawn_key=(epoch, _STREAM))
        lengths = np.maximum(ends - starts, 0)
        places, tokens = (np.empty(int(lengths.sum()), np.int64) for _ in range(2))
        offsets = np.empty(len(users) + 1, np.int64)
        augment(
            self._kinds, self._shares, self._tokens,
            keys.generate_state(len(self._kinds), np.uint64),
            users, starts, lengths, starts - positions, places, tokens, offsets,
        )  # fmt: skip
        return Sources(places[: offsets[-1]], tokens[: offsets[-1]], offsets)


@njit(nogil=True, cache=True)
def augment(
    kinds: IntArray,
    shares: Array,
    masks: IntArray,
    keys: Array,
    users: IntArray,
    starts: IntArray,
    lengths: IntArray,
    begins: IntArray,
    places: IntArray,
    tokens: IntArray,
    offsets: IntArray,
) -> None:
    """Write what is left of every window, as places and tokens, one user after the other.

    Draws for single events are keyed by their position among the user's events (the place less
    ``begins[b]``), so they do not depend on the window.
    """
    end = 0
    offsets[0] = 0
    for b in range(users.shape[0]):
        first, num = end, lengths[b]
        for i in range(num):
            places[first + i], tokens[first + i] = starts[b] + i, SHOWN
        for a in range(kinds.shape[0]):
            key = _subkey(keys[a], users[b])
            own, shown = places[first : first + num], tokens[first : first + num]
            if kinds[a] == CROP:
                num = _crop(own, shown, shares[a], key)
            elif kinds[a] == MASK:
                for i in range(num):
                    if _unit(_subkey(key, own[i] - begins[b])) < shares[a]:
                        shown[i] = masks[a]
            elif kinds[a] == REORDER:
                _reorder(own, shown, shares[a], key)
            else:
                num = _drop(own, shown, begins[b], shares[a], key)
        end = first + num
        offsets[b + 1] = end


@njit(nogil=True, cache=True)
def _crop(places: IntArray, tokens: IntArray, share: float, key: np.uint64) -> int:
    num = places.shape[0]
    if num == 0:
        return 0
    kept = max(1, int(share * num + _ROUNDING))
    first = _below(_subkey(key, 0), np.uint64(num - kept + 1))
    for i in range(kept):
        places[i], tokens[i] = places[first + i], tokens[first + i]
    return kept


@njit(nogil=True, cache=True)
def _reorder(places: IntArray, tokens: IntArray, share: float, key: np.uint64) -> None:
    num = places.shape[0]
    size = int(share * num + _ROUNDING)
    first = _below(_subkey(key, 0), np.uint64(num - size + 1))
    for i in range(size - 1, 0, -1):  # Fisher and Yates; draw 0 was the place
        j = first + _below(_subkey(key, i), np.uint64(i + 1))
        places[first + i], places[j] = places[j], places[first + i]
        tokens[first + i], tokens[j] = tokens[j], tokens[first + i]


@njit(nogil=True, cache=True)
def _drop(places: IntArray, tokens: IntArray, begin: int, share: float, key: np.uint64) -> int:
    num, kept = places.shape[0], 0
    for i in range(num):
        is_last = i == num - 1 and kept == 0
        if is_last or _unit(_subkey(key, places[i] - begin)) >= share:
            places[kept], tokens[kept] = places[i], tokens[i]
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def _gather(
    items: Array,
    places: IntArray,
    tokens: IntArray,
    offsets: IntArray,
    values: IntArray,
    targets: IntArray,
) -> None:
    num_users = offsets.shape[0] - 1
    for t in range(places.shape[0]):
        values[t] = items[places[t]] if tokens[t] == SHOWN else tokens[t]
    if targets.shape[0] == 0:
        return
    if targets.shape[0] == places.shape[0]:
        # Also right for one target a user where every user has a single event.
        for t in range(places.shape[0]):
            targets[t] = items[places[t] + 1]
        return
    for b in range(num_users):
        latest = places[offsets[b]]
        for t in range(offsets[b], offsets[b + 1]):
            latest = max(latest, places[t])
        targets[b] = items[latest + 1]
