"""Says which events of a store train, validate and test."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pinet_fast.data.store import SequenceStore

Part = Literal["valid", "test"]
Positions = npt.NDArray[np.int64]

_ROUNDING = 1e-9  # keeps 0.1 of 10 events one event


class Cuts(NamedTuple):
    """Ends of the parts of every user, positions, int64 [U]; the test part ends with the user."""

    train: Positions
    valid: Positions


class Rule(Protocol):
    """Cuts the events of every user, in order of time, into training, validation and test."""

    def __call__(self, store: SequenceStore) -> Cuts:
        """Return the ends of the parts."""
        ...


def _last_k(store: SequenceStore, k: int) -> Cuts:
    ends = store.offsets[1:]
    is_cut = store.lengths() > 2 * k
    return Cuts(np.where(is_cut, ends - 2 * k, ends), np.where(is_cut, ends - k, ends))


def _by_time(store: SequenceStore, valid_time: float, test_time: float) -> Cuts:
    times = store.timestamps
    if times is None:
        raise DataError(
            f"split before: log {store.source} has no timestamps; "
            "prepare it with its time column, or use Split.leave_one_out()"
        )
    first, last = times.min(), times.max()
    if not (first < valid_time and test_time <= last):
        raise DataError(
            f"split before: {valid_time} and {test_time} leave training or test without an "
            f"event; the times of log {store.source} go from {first} to {last}"
        )
    starts = store.offsets[:-1]
    # Events of a user are in order of time: those before a border are the first so many.
    train, valid = (
        starts + np.add.reduceat(times < border, starts, dtype=np.int64)
        for border in (valid_time, test_time)
    )
    return Cuts(train, valid)


def _by_ratio(store: SequenceStore, valid: float, test: float) -> Cuts:
    lengths, ends = store.lengths(), store.offsets[1:]
    num_valid, num_test = (
        np.floor(lengths * share + _ROUNDING).astype(np.int64) for share in (valid, test)
    )
    return Cuts(ends - num_test - num_valid, ends - num_test)


@dataclass(frozen=True)
class Split:
    """A division of every user's events in time; made by one of its class methods.

    Users are row numbers of the store (0..U-1), and positions are indices into ``store.items``.
    The training events of a user are its first, the test events its last.

    Attributes:
        name: Name of the rule with its numbers, for reports and fingerprints.
        rule: Cuts the events.
        is_global: Whether no user's training event may be later than another's held-out event.
    """

    name: str
    rule: Rule = field(default=partial(_last_k, k=1), repr=False, compare=False)
    is_global: bool = field(default=False, repr=False, compare=False)

    @classmethod
    def leave_one_out(cls) -> Split:
        """Hold out the last event of a user for test and the one before it for validation.

        Users with fewer than 3 events train only. Where times tie, the order of the store decides
        (``store.time_ties`` counts these users).
        """
        return cls("leave_one_out")

    @classmethod
    def leave_k_out(cls, k: int) -> Split:
        """Hold out the last k events of a user for test and the k before them for validation.

        Users with fewer than 2k + 1 events train only. Every held-out event is a target.

        Args:
            k: At least 1; 1 is ``leave_one_out``.

        Raises:
            ConfigError: k is no integer >= 1.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ConfigError(f"k: expected an integer >= 1, got {k!r}")
        if k == 1:
            return cls.leave_one_out()
        return cls(f"leave_{k}_out", partial(_last_k, k=int(k)))

    @classmethod
    def before(cls, valid_time: float, test_time: float) -> Split:
        """Train on what happened before a moment; everyone's later events are held out.

        Events at ``valid_time`` and later validate, at ``test_time`` and later test. Users whose
        first event is later have no training event and activeness 0; their first event is no
        target, as nothing comes before it. Stores without timestamps are refused at first use.

        Args:
            valid_time: Like the timestamps of the store; later than the earliest.
            test_time: Later than ``valid_time``, not later than the latest.

        Raises:
            ConfigError: The times are not two ascending numbers.
        """
        for name, time in (("valid_time", valid_time), ("test_time", test_time)):
            _check_number(name, time)
        if not valid_time < test_time:
            raise ConfigError(f"test_time: expected more than {valid_time}, got {test_time}")
        rule = partial(_by_time, valid_time=valid_time, test_time=test_time)
        return cls(f"before({valid_time}, {test_time})", rule, is_global=True)

    @classmethod
    def ratio(cls, train: float, valid: float) -> Split:
        """Hold out a share of every user's events.

        Of n events, the last ``floor(n * (1 - train - valid))`` test and ``floor(n * valid)``
        before them validate; the rest trains. Users with few events may lack one part or both.

        Args:
            train: Share of the training events, between 0 and 1.
            valid: Share of the validation events, above 0; what both leave is for test.

        Raises:
            ConfigError: A share out of its range, or nothing left for test.
        """
        for name, share in (("train", train), ("valid", valid)):
            _check_number(name, share)
            if not 0 < share < 1:
                raise ConfigError(f"{name}: expected a share between 0 and 1, got {share}")
        test = 1 - train - valid
        if test < _ROUNDING:
            raise ConfigError(
                f"valid: train {train} and valid {valid} leave nothing for test; lower one"
            )
        return cls(f"ratio({train}, {valid})", partial(_by_ratio, valid=valid, test=test))

    def train_ends(self, store: SequenceStore) -> Positions:
        """Return the position after the last training event of every user, int64 [U]."""
        return self.rule(store).train

    def train_lengths(self, store: SequenceStore) -> Positions:
        """Return the training events of every user (the user's activeness), int64 [U]."""
        return self.train_ends(store) - store.offsets[:-1]

    def holdout(self, store: SequenceStore, part: Part = "test") -> tuple[Positions, Positions]:
        """Return the held-out events of a part, and whose they are.

        A user comes once for every held-out event: once with ``leave_one_out``, k times with
        ``leave_k_out``, any number of times otherwise. The history of a target is every event of
        the user before it; for ``"test"`` that includes the validation events, and the earlier
        targets of the part. A first event has no history and is no target.

        Args:
            store: The store.
            part: ``"valid"`` or ``"test"``.

        Returns:
            Users, int64 [M] ascending, and target positions, int64 [M] ascending.

        Raises:
            ConfigError: ``part`` is neither.
        """
        if part not in get_args(Part):
            raise ConfigError(f"part: expected 'valid' or 'test', got {part!r}")
        train, valid = self.rule(store)
        starts, ends = (train, valid) if part == "valid" else (valid, store.offsets[1:])
        starts = np.maximum(starts, store.offsets[:-1] + 1)
        counts = np.maximum(ends - starts, 0)
        users = np.repeat(np.arange(store.num_users), counts)
        within = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
        return users, starts[users] + within

    def assert_no_leak(self, store: SequenceStore) -> None:
        """Check that every target comes after all training events, and test after validation.

        That holds within every user, and for ``before`` also between users, by the timestamps.

        Args:
            store: The store.

        Raises:
            DataError: A held-out event lies among the training events or outside its user's.
        """
        starts, ends, train_ends = store.offsets[:-1], store.offsets[1:], self.train_ends(store)
        is_outside = (train_ends < starts) | (train_ends > ends)
        if bool(is_outside.any()) or bool((train_ends == starts).all()):
            raise DataError(f"split {self.name}: training events outside their user's events")
        last = np.maximum(train_ends - 1, starts)  # latest event that a target must follow
        for part in get_args(Part):
            users, targets = self.holdout(store, part)
            if bool((targets <= last[users]).any()) or bool((targets >= ends[users]).any()):
                raise DataError(
                    f"split {self.name}: a held-out event does not follow the training events"
                )
            np.maximum.at(last, users, targets)
        if self.is_global:
            self._assert_no_leak_in_time(store, train_ends)

    def _assert_no_leak_in_time(self, store: SequenceStore, train_ends: Positions) -> None:
        times = store.timestamps
        assert times is not None  # the rule refuses a store without
        trained = train_ends > store.offsets[:-1]
        latest = times[train_ends[trained] - 1].max()
        for part in get_args(Part):
            held_out = times[self.holdout(store, part)[1]]
            if len(held_out) and held_out.min() <= latest:
                raise DataError(
                    f"split {self.name}: a held-out event at {held_out.min()} is not later than "
                    f"the training or validation events, up to {latest}"
                )
            latest = max(latest, held_out.max(initial=latest))


def _check_number(name: str, value: object) -> None:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):  # type: ignore[arg-type]
        raise ConfigError(f"{name}: expected a number, got {value!r}")
