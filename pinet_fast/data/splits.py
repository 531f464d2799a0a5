"""Says which events of a store train, validate and test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pinet_fast.data.store import SequenceStore

Part = Literal["valid", "test"]
Positions = npt.NDArray[np.int64]

_MIN_EVENTS = 3
_DISTANCE_FROM_END = {"valid": 2, "test": 1}


@dataclass(frozen=True)
class Split:
    """A division of every user's events in time; made by ``Split.leave_one_out()``.

    Users are row numbers of the store (0..U-1), and positions are indices into ``store.items``.

    Attributes:
        name: Name of the rule, for reports and fingerprints.
    """

    name: str

    @classmethod
    def leave_one_out(cls) -> Split:
        """Hold out the last event of a user for test and the one before it for validation.

        Users with fewer than 3 events train only. Where times tie, the order of the store decides
        (``store.time_ties`` counts these users).
        """
        return cls("leave_one_out")

    def train_ends(self, store: SequenceStore) -> Positions:
        """Return the position after the last training event of every user, int64 [U]."""
        ends = store.offsets[1:]
        return np.where(store.lengths() >= _MIN_EVENTS, ends - 2, ends)

    def train_lengths(self, store: SequenceStore) -> Positions:
        """Return the training events of every user (the user's activeness), int64 [U]."""
        return self.train_ends(store) - store.offsets[:-1]

    def holdout(self, store: SequenceStore, part: Part = "test") -> tuple[Positions, Positions]:
        """Return the users that have an event held out, and where it is.

        The history of a target is every event of the user before it; for ``"test"`` that includes
        the validation event.

        Args:
            store: The store.
            part: ``"valid"`` or ``"test"``.

        Returns:
            Users, int64 [M] ascending, and target positions, int64 [M].

        Raises:
            ConfigError: ``part`` is neither.
        """
        if part not in get_args(Part):
            raise ConfigError(f"part: expected 'valid' or 'test', got {part!r}")
        users = np.flatnonzero(store.lengths() >= _MIN_EVENTS)
        return users, store.offsets[users + 1] - _DISTANCE_FROM_END[part]

    def assert_no_leak(self, store: SequenceStore) -> None:
        """Check that every target comes after all training events, and test after validation.

        Args:
            store: The store.

        Raises:
            DataError: A held-out event lies among the training events or outside its user's.
        """
        starts, ends, train_ends = store.offsets[:-1], store.offsets[1:], self.train_ends(store)
        if bool(((train_ends <= starts) | (train_ends > ends)).any()):
            raise DataError(f"split {self.name}: training events outside their user's events")
        valid_users, valid = self.holdout(store, "valid")
        test_users, test = self.holdout(store, "test")
        is_leak = (
            not np.array_equal(valid_users, test_users)
            or bool((valid < train_ends[valid_users]).any())
            or bool((test <= valid).any())
            or bool((test >= ends[test_users]).any())
        )
        if is_leak:
            raise DataError(
                f"split {self.name}: a held-out event does not follow the training events"
            )
