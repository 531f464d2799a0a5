"""Negatives: how many, of which distribution, and which items they never are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pinet_fast.data import _njit
from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pinet_fast.data.splits import Part, Split
    from pinet_fast.data.store import SequenceStore

Exclude = Literal["history", "window", "targets", "none"]
Per = Literal["event", "user", "batch"]
Dist = Literal["uniform", "popularity"]
IntArray = npt.NDArray[np.int64]
Items = npt.NDArray[Any]  # int32 or int64
FloatArray = npt.NDArray[np.float64]
LogQ = npt.NDArray[np.float32]

# Part these streams of random numbers from others under the same seed.
_STREAM, _BATCH_STREAM, _FROZEN_STREAM = 1, 3, 4
_NO_ITEMS = np.zeros(0, np.int32)
_NO_LOG_Q = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Negatives:
    """How many negatives there are, how they are drawn, and which items are none.

    Attributes:
        n: Negatives of an event, user or batch, at least 1; drawn independently of each other.
        per: ``"event"``: n for every target; ``"user"``: n for every user of a batch; ``"batch"``:
            n for the whole batch.
        dist: ``"uniform"``, or ``"popularity"``: in proportion to (training events of the
            item)^alpha, where an item without any counts as if it had one.
        alpha: Exponent of the popularity.
        exclude: ``"history"``: never an item of the user's training events; ``"window"``: never
            an item of the events that the batch shows of the user, targets included;
            ``"targets"``: per event never its target, per user none of the user's targets;
            ``"none"``: any item but padding. Per batch these hold for every user of the batch.
        log_q: Whether batches carry the log-probability of every negative.

    Raises:
        ConfigError: Another value of any of them.
    """

    n: int = 1
    exclude: Exclude = "history"
    per: Per = field(default="event", kw_only=True)
    dist: Dist = field(default="uniform", kw_only=True)
    alpha: float = field(default=1.0, kw_only=True)
    log_q: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ConfigError(f"negatives: expected n >= 1, got {self.n!r}")
        for name, kind in (("exclude", Exclude), ("per", Per), ("dist", Dist)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise ConfigError(
                    f"negatives: expected {name} {', '.join(map(repr, known))}, got {value!r}"
                )
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float):
            raise ConfigError(f"negatives: expected alpha to be a number, got {self.alpha!r}")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"negatives: expected a finite alpha, got {self.alpha!r}")

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
        starts, ends = store.offsets[:-1], split.train_ends(store)
        popularity = self._popularity(store, starts, ends)
        if self.exclude != "history":
            offsets = np.zeros(store.num_users + 1, np.int64)
            return BoundNegatives(self, store, _NO_ITEMS, offsets, seed, popularity)
        histories, offsets = unique_lists(store.items, starts, ends)
        full = np.flatnonzero(np.diff(offsets) >= store.num_items)
        if len(full):
            raise DataError(
                f"log {store.source}: user {store.user_ids[full[0]]} has all {store.num_items:,} "
                "items of the catalogue, so no negative is left; drop the user or use "
                "Negatives(exclude='none')"
            )
        return BoundNegatives(self, store, histories.copy(), offsets, seed, popularity)

    def frozen(
        self, store: SequenceStore, split: Split, *, part: Part = "test", seed: int = 0
    ) -> FrozenNegatives:
        """Fix negatives for a sampled evaluation: the same for every epoch, model and batch size.

        They are never the held-out item, nor, with ``exclude="history"``, an item of any event
        before it.

        Args:
            store: The store.
            split: Which events are held out; popularity counts its training events.
            part: ``"valid"`` or ``"test"``, which have negatives of their own.
            seed: Decides the draws.

        Returns:
            What ``evaluation_batches(negatives=...)`` takes.

        Raises:
            ConfigError: ``per`` is not ``"user"`` or ``"event"`` (one target a user, so they are
                the same), or ``exclude`` is ``"window"``.
        """
        if self.per == "batch" or self.exclude == "window":
            raise ConfigError(
                "negatives: frozen ones belong to a user and a target: expected per='user' and "
                f"exclude 'history', 'targets' or 'none', got per={self.per!r}, "
                f"exclude={self.exclude!r}"
            )
        starts, ends = store.offsets[:-1], split.train_ends(store)
        key = _key(seed, 0, _FROZEN_STREAM, 0 if part == "valid" else 1)
        return FrozenNegatives(self, store, part, key, self._popularity(store, starts, ends))

    def _popularity(
        self, store: SequenceStore, starts: IntArray, ends: IntArray
    ) -> Popularity | None:
        if self.dist == "uniform":
            return None
        counts = np.zeros(store.num_items + 1, np.int64)
        _njit.count_items(store.items, starts, ends, counts)
        log_weights = self.alpha * np.log(np.maximum(counts[1:], 1))
        return Popularity.of(np.exp(log_weights - log_weights.max()))


@dataclass(frozen=True, eq=False)
class Popularity:
    """Weights of the items as an alias table and as running sums.

    Attributes:
        cumulative: Weight of items 1..v, float64 [V + 1].
        keep: Share of column v - 1 that is item v, float64 [V].
        alias: Column of the rest, int64 [V].
    """

    cumulative: FloatArray
    keep: FloatArray
    alias: IntArray

    @classmethod
    def of(cls, weights: FloatArray) -> Popularity:
        """Build both from the weights of items 1..V, float64 [V], all above 0."""
        weights = weights / weights.sum()
        keep, alias = np.empty(len(weights)), np.empty(len(weights), np.int64)
        _njit.alias_table(weights, keep, alias)
        return cls(np.concatenate(([0.0], np.cumsum(weights))), keep, alias)


@dataclass(frozen=True, eq=False)
class BoundNegatives:
    """Draws negatives for one store; made by ``Negatives.bind``.

    Attributes:
        options: How they are drawn.
        store: The store.
        histories: Sorted unique training items of every user, one after the other, int32; empty
            unless ``exclude="history"``.
        history_offsets: int64 [U + 1].
        seed: Decides, with the epoch, the draws.
        popularity: Weights of the items, or None where they are equal.
    """

    options: Negatives
    store: SequenceStore
    histories: npt.NDArray[np.int32]
    history_offsets: IntArray
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
                ``exclude`` is ``"history"`` or ``"none"`` and ``per`` is not ``"batch"``.
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
        lists = _excluded(self, users, offsets, starts, ends, targets)
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


@dataclass(frozen=True, eq=False)
class _Lists:
    """Excluded items: list ``numbers[b]`` is that of row b, or event t has ``items[t]`` alone."""

    items: Items
    offsets: IntArray
    numbers: IntArray
    is_own: bool = False


def _excluded(
    bound: BoundNegatives,
    users: IntArray,
    offsets: IntArray,
    starts: IntArray | None,
    ends: IntArray | None,
    targets: IntArray | None,
) -> _Lists:
    exclude, per, store = bound.options.exclude, bound.options.per, bound.store
    items: Items
    if exclude == "none":
        return _Lists(_NO_ITEMS, np.zeros(2, np.int64), np.zeros(len(users), np.int64))
    if exclude == "history":
        if per != "batch":
            return _Lists(bound.histories, bound.history_offsets, users)
        borders = bound.history_offsets
        items, lists = unique_lists(bound.histories, borders[users], borders[users + 1])
    elif exclude == "window":
        if starts is None or ends is None:
            raise ConfigError("negatives: exclude='window' needs the windows of the users")
        items, lists = unique_lists(store.items, starts, ends)
    else:
        if targets is None:
            raise ConfigError("negatives: exclude='targets' needs the targets of the batch")
        if per == "event":
            _refuse_full(store, store.num_items < 2, "the target is")
            return _Lists(targets, offsets, users, is_own=True)
        items, lists = unique_lists(targets, offsets[:-1], offsets[1:])
    if per == "batch":
        items = np.unique(items)
        lists = np.array([0, len(items)])
    full = bool((np.diff(lists) >= store.num_items).any())
    _refuse_full(store, full, "the excluded items of one batch are")
    return _Lists(items, lists, np.arange(len(lists) - 1))


def _refuse_full(store: SequenceStore, is_full: bool, what: str) -> None:
    if is_full:
        raise DataError(
            f"log {store.source}: {what} all {store.num_items:,} items of the catalogue, so no "
            "negative is left; use a smaller max_len or batch, or Negatives(exclude='none')"
        )


def unique_lists(items: Items, starts: IntArray, ends: IntArray) -> tuple[Items, IntArray]:
    """Return the sorted unique items of every window, and the offsets of the lists."""
    out = np.empty(int((ends - starts).sum()), items.dtype)
    offsets = np.empty(len(starts) + 1, np.int64)
    _njit.unique_histories(items, starts, ends, out, offsets)
    return out[: offsets[-1]], offsets


def _key(seed: int, *stream: int) -> np.uint64:
    sequence = np.random.SeedSequence(seed, spawn_key=stream)
    return np.uint64(sequence.generate_state(1, np.uint64)[0])


def _draw(
    popularity: Popularity | None,
    num_items: int,
    lists: _Lists,
    users: IntArray,
    first_positions: IntArray,
    offsets: IntArray,
    key: np.uint64,
    n: int,
    out: IntArray,
    log_q: LogQ,
) -> None:
    if popularity is None:
        _njit.draw_uniform(
            lists.items, lists.offsets, lists.numbers, lists.is_own, num_items,
            users, first_positions, offsets, key, n, out, log_q,
        )  # fmt: skip
    else:
        _njit.draw_weighted(
            lists.items, lists.offsets, lists.numbers, lists.is_own,
            popularity.cumulative, popularity.keep, popularity.alias,
            users, first_positions, offsets, key, n, out, log_q,
        )  # fmt: skip


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
        firsts = self.store.offsets[users]
        begins = firsts if self.options.exclude == "history" else positions
        items, borders = unique_lists(self.store.items, begins, positions + 1)
        lists = _Lists(items, borders, np.arange(len(users)))
        full = np.flatnonzero(np.diff(lists.offsets) >= self.store.num_items)
        if len(full):
            raise DataError(
                f"log {self.store.source}: user {self.store.user_ids[users[full[0]]]} has all "
                f"{self.store.num_items:,} items of the catalogue, so no negative is left; drop "
                "the user or use Negatives(exclude='targets')"
            )
        out = np.empty((len(users), self.options.n), np.int64)
        _draw(
            self.popularity, self.store.num_items, lists, users, positions - firsts,
            np.arange(len(users) + 1), self.key, self.options.n, out.reshape(-1), _NO_LOG_Q,
        )  # fmt: skip
        return out
