"""Uniform negatives that never meet the user's training history, drawn without rejection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from pinet_fast.data import _njit
from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pinet_fast.data.splits import Split
    from pinet_fast.data.store import SequenceStore

Exclude = Literal["history", "none"]
IntArray = npt.NDArray[np.int64]

_STREAM = 1  # parts this stream of random numbers from others under the same seed


@dataclass(frozen=True)
class Negatives:
    """How many negatives an event gets, and which items are none.

    Attributes:
        n: Negatives of an event, at least 1.
        exclude: ``"history"``: never an item of the user's training events; ``"none"``: any item
            but padding.

    Raises:
        ConfigError: Another value of either.
    """

    n: int = 1
    exclude: Exclude = "history"

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ConfigError(f"negatives: expected n >= 1, got {self.n!r}")
        if self.exclude not in get_args(Exclude):
            raise ConfigError(
                f"negatives: expected exclude 'history' or 'none', got {self.exclude!r}"
            )

    def bind(self, store: SequenceStore, split: Split, *, seed: int = 0) -> BoundNegatives:
        """Prepare to draw for the users of a store.

        Args:
            store: The store.
            split: Which events are training events.
            seed: Decides, with the epoch, the draws.

        Returns:
            What draws.

        Raises:
            DataError: With ``"history"``, a user who has every item of the catalogue.
        """
        if self.exclude == "none":
            offsets = np.zeros(store.num_users + 1, np.int64)
            return BoundNegatives(self.n, store.num_items, np.zeros(0, np.int32), offsets, seed)
        starts, ends = store.offsets[:-1], split.train_ends(store)
        histories = np.empty(int((ends - starts).sum()), np.int32)
        offsets = np.empty(store.num_users + 1, np.int64)
        _njit.unique_histories(store.items, starts, ends, histories, offsets)
        full = np.flatnonzero(np.diff(offsets) >= store.num_items)
        if len(full):
            raise DataError(
                f"log {store.source}: user {store.user_ids[full[0]]} has all {store.num_items:,} "
                "items of the catalogue, so no negative is left; drop the user or use "
                "Negatives(exclude='none')"
            )
        return BoundNegatives(
            self.n, store.num_items, histories[: offsets[-1]].copy(), offsets, seed
        )


@dataclass(frozen=True, eq=False)
class BoundNegatives:
    """Draws negatives for one store; made by ``Negatives.bind``.

    Attributes:
        n: Negatives of an event.
        num_items: V.
        histories: Sorted unique excluded items of every user, one after the other, int32.
        history_offsets: int64 [U + 1].
        seed: Decides, with the epoch, the draws.
    """

    n: int
    num_items: int
    histories: npt.NDArray[np.int32]
    history_offsets: IntArray
    seed: int

    def draw(
        self, epoch: int, users: IntArray, first_positions: IntArray, offsets: IntArray
    ) -> IntArray:
        """Draw for the events of a ragged batch.

        A draw depends on the seed, the epoch, the user and the position of the event in the
        user's sequence only: not on the batch, the order of batches, or the length of the window.

        Args:
            epoch: From 0.
            users: Row numbers of the store, int64 [B].
            first_positions: Position of each user's first target in the user's sequence, int64 [B].
            offsets: Ragged offsets of the targets, int64 [B + 1].

        Returns:
            Items 1..V, a new int64 [T, n].
        """
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch, _STREAM))
        key = sequence.generate_state(1, np.uint64)[0]
        out = np.empty(int(offsets[-1]) * self.n, np.int64)
        _njit.draw_negatives(
            self.histories,
            self.history_offsets,
            self.num_items,
            users,
            first_positions,
            offsets,
            key,
            self.n,
            out,
        )
        return out.reshape(-1, self.n)
