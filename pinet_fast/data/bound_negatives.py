"""Draws negatives: for training, anew in every epoch, or fixed for an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pinet_fast.data import _njit_negatives
from pinet_fast.data._exclusion import Lists, unique_lists
from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pinet_fast.data._popularity import Popularity
    from pinet_fast.data.negatives import Negatives
    from pinet_fast.data.splits import Part
    from pinet_fast.data.store import SequenceStore

IntArray = npt.NDArray[np.int64]
LogQ = npt.NDArray[np.float32]

# Part these streams of random numbers from others under the same seed.
_STREAM, _BATCH_STREAM, _FROZEN_STREAM = 1, 3, 4
_NO_LOG_Q = np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class BoundNegatives:
    """Draws negatives for one store; made by ``Negatives.bind``.

    Attributes:
        options: How they are drawn.
        store: The store.
        counts: Events of every user whose items ``"history"`` and ``"sequence"`` exclude, int64
            [U]: training events, or all of them.
        seed: Decides, with the epoch, the draws.
        popularity: Weights of the items, or None where they are equal.
    """

    options: Negatives
    store: SequenceStore
    counts: IntArray
    seed: int
    popularity: Popularity | None = None

    @property
    def n(self) -> int:
        """Return the negatives of an event, user or batch."""
        return self.options.n

    @property
    def num_items(self) -> int:
        """Return V."""
        return self.store.num_items

    def shape(self, num_targets: int, num_users: int) -> tuple[int, ...]:
        """Return the shape of what ``draw`` returns."""
        rows = {"event": (num_targets,), "user": (num_users,), "batch": ()}[self.options.per]
        return (*rows, self.n)

    def draw(
        self,
        epoch: int,
        users: IntArray,
        first_positions: IntArray,
        offsets: IntArray,
        *,
        step: int = 0,
        starts: IntArray | None = None,
        ends: IntArray | None = None,
        targets: IntArray | None = None,
        out: IntArray | None = None,
        log_q: LogQ | None = None,
    ) -> IntArray:
        """Draw for a ragged batch.

        A draw per event depends on the seed, the epoch, the user and the position of the event in
        the user's sequence only, and per user on the first three: not on the batch, the order of
        batches, or the length of the window. (Which items are excluded may depend on the window.)
        A draw per batch depends on the seed, the epoch and the step.

        Args:
            epoch: From 0.
            users: Row numbers of the store, int64 [B].
            first_positions: Position of each user's first target in the user's sequence, int64 [B].
            offsets: Ragged offsets of the targets, int64 [B + 1].
            step: Batch of the epoch; only draws per batch depend on it.
            starts: Where the users' windows begin in ``store.items``, int64 [B]; needed unless
                ``exclude`` is ``"history"``, ``"sequence"`` or ``"none"`` and ``per`` is not
                ``"batch"``.
            ends: Where they end, targets included.
            targets: Targets, int64 [T]; needed by ``exclude="targets"``.
            out: Where to write, int64 of ``shape``; None for a new array.
            log_q: Where to write log-probabilities, float32 of ``shape``; None for nowhere.

        Returns:
            Items 1..V of ``shape``: [T, n], [B, n] or [n].

        Raises:
            DataError: The excluded items are the whole catalogue.
        """
        if out is None:
            out = np.empty(self.shape(int(offsets[-1]), len(users)), np.int64)
        flat_log_q = _NO_LOG_Q if log_q is None else log_q.reshape(-1)
        lists = self._excluded(users, offsets, starts, ends, targets)
        if self.options.per == "batch":
            key, rows = _key(self.seed, epoch, _BATCH_STREAM, step), np.zeros(1, np.int64)
            first_positions, offsets = rows, np.array([0, 1])
        else:
            key, rows = _key(self.seed, epoch, _STREAM), users
            if self.options.per == "user":
                first_positions = np.zeros(len(users), np.int64)
                offsets = np.arange(len(users) + 1)
        _draw(
            self.popularity, self.num_items, lists, rows, first_positions, offsets, key, self.n,
            out.reshape(-1), flat_log_q,
        )  # fmt: skip
        return out

    def _excluded(
        self,
        users: IntArray,
        offsets: IntArray,
        starts: IntArray | None,
        ends: IntArray | None,
        targets: IntArray | None,
    ) -> Lists:
        exclude, per, store = self.options.exclude, self.options.per, self.store
        if exclude == "none":
            return Lists.empty(len(users))
        if exclude == "targets" and targets is not None and per == "event":
            return Lists.own(store, targets, offsets, users)
        if exclude in ("history", "sequence"):
            # That a single user has every item was refused by ``bind``.
            lists = Lists.by_row(*store.histories.before(users, self.counts[users]))
            return lists.united(store) if per == "batch" else lists
        if exclude == "window":
            if starts is None or ends is None:
                raise ConfigError("negatives: exclude='window' needs the windows of the users")
            lists = Lists.by_row(*unique_lists(store.items, starts, ends))
        else:
            if targets is None:
                raise ConfigError("negatives: exclude='targets' needs the targets of the batch")
            lists = Lists.by_row(*unique_lists(targets, offsets[:-1], offsets[1:]))
        return lists.united(store) if per == "batch" else lists.checked(store)


@dataclass(frozen=True, eq=False)
class FrozenNegatives:
    """A fixed set of negatives for every held-out event; made by ``Negatives.frozen``.

    Nothing is stored: a set is drawn anew, always the same, when it is asked for.

    Attributes:
        options: How they are drawn.
        store: The store.
        part: Which held-out events they belong to.
        key: Decides the draws.
        popularity: Weights of the items, or None where they are equal.
    """

    options: Negatives
    store: SequenceStore
    part: Part
    key: np.uint64
    popularity: Popularity | None = None

    @classmethod
    def of(
        cls,
        options: Negatives,
        store: SequenceStore,
        part: Part,
        *,
        seed: int,
        popularity: Popularity | None,
    ) -> FrozenNegatives:
        """Return the set of a seed; validation and test have sets of their own."""
        key = _key(seed, 0, _FROZEN_STREAM, 0 if part == "valid" else 1)
        return cls(options, store, part, key, popularity)

    def draw(self, users: IntArray, positions: IntArray) -> IntArray:
        """Return the negatives of held-out events.

        Args:
            users: Row numbers of the store, int64 [B].
            positions: Where the held-out events lie in ``store.items``, int64 [B].

        Returns:
            Items 1..V, a new int64 [B, n].

        Raises:
            DataError: A user who has every item of the catalogue.
        """
        places = positions - self.store.offsets[users]
        if self.options.exclude == "history":
            lists = Lists.by_row(*self.store.histories.before(users, places + 1))
        elif self.options.exclude == "sequence":
            lists = Lists.by_row(*self.store.histories.before(users, self.store.lengths()[users]))
        else:
            lists = Lists.by_row(*unique_lists(self.store.items, positions, positions + 1))
        full = np.flatnonzero(np.diff(lists.offsets) >= self.store.num_items)
        if len(full):
            raise DataError(
                f"log {self.store.source}: user {self.store.user_ids[users[full[0]]]} has all "
                f"{self.store.num_items:,} items of the catalogue, so no negative is left; drop "
                "the user or use Negatives(exclude='targets')"
            )
        out = np.empty((len(users), self.options.n), np.int64)
        _draw(
            self.popularity, self.store.num_items, lists, users, places,
            np.arange(len(users) + 1), self.key, self.options.n, out.reshape(-1), _NO_LOG_Q,
        )  # fmt: skip
        return out


def _key(seed: int, *stream: int) -> np.uint64:
    sequence = np.random.SeedSequence(seed, spawn_key=stream)
    return np.uint64(sequence.generate_state(1, np.uint64)[0])


def _draw(
    popularity: Popularity | None,
    num_items: int,
    lists: Lists,
    users: IntArray,
    first_positions: IntArray,
    offsets: IntArray,
    key: np.uint64,
    n: int,
    out: IntArray,
    log_q: LogQ,
) -> None:
    if popularity is None:
        _njit_negatives.draw_uniform(
            lists.items, lists.offsets, lists.numbers, lists.is_own, num_items,
            users, first_positions, offsets, key, n, out, log_q,
        )  # fmt: skip
    else:
        _njit_negatives.draw_weighted(
            lists.items, lists.offsets, lists.numbers, lists.is_own,
            popularity.cumulative, popularity.keep, popularity.alias,
            users, first_positions, offsets, key, n, out, log_q,
        )  # fmt: skip
