"""Divides users into strata by activeness, the number of their training events."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pinet_fast.errors import StrataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.data.splits import Split
    from pinet_fast.data.store import SequenceStore

IntArray = npt.NDArray[np.int64]

_EXAMPLES = '"head:0.2", "quantile:5" or "5,20,100"'
_MIN_TRAINABLE = 2  # a next-event target needs an event before it
# Keeps a quantile that is a whole number but for rounding, such as 6.999999999, on that number.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Strata:
    """Users in S strata; made by ``Strata.by_activeness`` or ``Strata.from_labels``.

    Strata by activeness are numbered from least to most active.

    Attributes:
        spec: The edges as they were asked for, or ``"labels"``.
        edges: Least activeness of strata 1..S-1, S - 1 ascending ints; what routes new users.
            Empty for strata from labels.
        names: ``("tail", "head")``, ranges such as ``"5-8 events"``, or the labels.
        activeness: Training events of every user, int64 [U].
        ids: Stratum of every user, int64 [U].
        user_counts: Users of every stratum, int64 [S].
        event_counts: Training events of every stratum, int64 [S].
        store_fingerprint: Fingerprint of the store they were made from.
        fingerprint: Hex digest of the store, the split and the edges or labels.
    """

    spec: str
    edges: tuple[int, ...]
    names: tuple[str, ...]
    activeness: IntArray
    ids: IntArray
    store_fingerprint: str
    fingerprint: str
    user_counts: IntArray = field(init=False)
    event_counts: IntArray = field(init=False)

    def __post_init__(self) -> None:
        events = np.bincount(self.ids, weights=self.activeness, minlength=self.num_strata)
        object.__setattr__(self, "user_counts", np.bincount(self.ids, minlength=self.num_strata))
        object.__setattr__(self, "event_counts", events.astype(np.int64))

    @classmethod
    def by_activeness(
        cls, store: SequenceStore, *, split: Split, edges: str | Sequence[int]
    ) -> Strata:
        """Divide the users of a store; users of equal activeness are never parted.

        Args:
            store: The store.
            split: Which events are training events; only these count.
            edges: ``"head:0.2"``: head users are those with more events than the 0.8 quantile of
                activeness, about the most active fifth. ``"quantile:K"``: K strata with borders at
                the quantiles j/K by the same rule. Ascending ints, or a string of them,
                ``"5,20,100"``: the stratum is the number of edges not above the activeness.

        Returns:
            The strata.

        Raises:
            StrataError: An unknown form of edges, an empty stratum, or no user with two training
                events.
        """
        activeness = _trainable(store, split)
        spec, bounds = _parse(edges, activeness)
        _check_populated(spec, bounds, activeness)
        state = [store.fingerprint, split.name, list(bounds)]
        return cls(
            spec=spec,
            edges=bounds,
            names=_names(spec, bounds, int(activeness.min())),
            activeness=activeness,
            ids=_route(bounds, activeness),
            store_fingerprint=store.fingerprint,
            fingerprint=hashlib.sha256(json.dumps(state).encode()).hexdigest(),
        )

    @classmethod
    def from_labels(cls, store: SequenceStore, labels: npt.ArrayLike, *, split: Split) -> Strata:
        """Divide the users of a store by a column of their own, such as a country or a plan.

        Args:
            store: The store.
            labels: Integers or strings, [U]; label ``u`` is that of ``store.user_ids[u]``. The
                strata are numbered in ascending order of the labels.
            split: Which events are training events; only these count as activeness.

        Returns:
            The strata; ``route`` refuses, as nothing tells the label of a new user.

        Raises:
            StrataError: Not one label a user, labels of another type, less than two labels, or no
                user with two training events.
        """
        column = np.asarray(labels)
        if column.dtype == object:  # such as strings of a table: what type do they have?
            column = np.asarray(column.tolist())
        if column.shape != (store.num_users,):
            raise StrataError(
                f"labels: expected one for each of {store.num_users:,} users of {store.source}, "
                f"got shape {column.shape}; order them like store.user_ids"
            )
        if column.dtype.kind not in "biuU":
            raise StrataError(
                f"labels: expected integers or strings, got {column.dtype}; "
                "replace missing ones by a label of their own"
            )
        values, ids = np.unique(column, return_inverse=True)
        if len(values) == 1:
            raise StrataError(f"labels: expected two or more, got only {values[0]}")
        names = tuple(map(str, values))
        digest = hashlib.sha256(ids.astype(np.int64).tobytes()).hexdigest()
        state = [store.fingerprint, split.name, "labels", names, digest]
        return cls(
            spec="labels",
            edges=(),
            names=names,
            activeness=_trainable(store, split),
            ids=ids.astype(np.int64),
            store_fingerprint=store.fingerprint,
            fingerprint=hashlib.sha256(json.dumps(state).encode()).hexdigest(),
        )

    @property
    def num_strata(self) -> int:
        """Return S."""
        return len(self.names)

    @cached_property
    def border_ties(self) -> tuple[int, ...]:
        """Return how many users have the greatest activeness below each edge, S - 1 counts.

        They are never parted: all of them are below the edge, which is why a stratum may have
        that many users more than the share that was asked for.
        """
        values, counts = np.unique(self.activeness, return_counts=True)
        below = np.searchsorted(values, self.edges) - 1
        return tuple(counts[below].tolist()) if self.edges else ()

    def route(self, activeness: npt.ArrayLike) -> IntArray:
        """Return the strata of users by their numbers of events, int64 of the same shape.

        Args:
            activeness: Numbers of events.

        Raises:
            StrataError: The strata are made from labels.
        """
        if not self.edges:
            raise StrataError(
                "strata from labels: activeness does not tell the stratum; "
                "pass the strata of new users yourself"
            )
        return _route(self.edges, activeness)

    def describe(self) -> list[dict[str, Any]]:
        """Return a row a stratum: its name, users and training events with their shares.

        ``border_ties`` are the users on the stratum's upper border (see there), None without one.
        """
        users, events = self.user_counts, self.event_counts
        ties = [*self.border_ties, *[None] * self.num_strata]
        return [
            {
                "stratum": s,
                "name": name,
                "users": int(users[s]),
                "user_share": float(users[s] / users.sum()),
                "events": int(events[s]),
                "event_share": float(events[s] / events.sum()),
                "border_ties": ties[s],
            }
            for s, name in enumerate(self.names)
        ]


def _trainable(store: SequenceStore, split: Split) -> IntArray:
    activeness = split.train_lengths(store)
    if int(activeness.max()) < _MIN_TRAINABLE:
        raise StrataError(
            f"log {store.source}: no user has two training events (of {store.num_users:,} "
            "users), so nothing can be learned; check that --user-col names the user column"
        )
    return activeness


def _route(bounds: Sequence[int], activeness: npt.ArrayLike) -> IntArray:
    return np.searchsorted(np.asarray(bounds, np.int64), activeness, side="right")


def _parse(edges: str | Sequence[int], activeness: IntArray) -> tuple[str, tuple[int, ...]]:
    if isinstance(edges, str):
        kind, _, value = edges.strip().partition(":")
        if kind == "head" and value:
            return edges.strip(), _head_bounds(edges, value, activeness)
        if kind == "quantile" and value:
            return edges.strip(), _quantile_bounds(edges, value, activeness)
        parts: list[Any] = edges.split(",")
    else:
        parts = list(edges)
    try:
        bounds = tuple(int(part) for part in parts)
        is_exact = isinstance(edges, str) or all(
            bound == part for bound, part in zip(bounds, parts, strict=True)
        )
    except (TypeError, ValueError):
        raise _unknown(edges) from None
    if not bounds or not is_exact:
        raise _unknown(edges)
    if any(b <= a for a, b in itertools.pairwise(bounds)):
        raise StrataError(f"strata {edges!r}: expected ascending edges; sort them, drop doubles")
    return ",".join(map(str, bounds)), bounds


def _unknown(edges: object) -> StrataError:
    return StrataError(f"strata {edges!r}: expected edges such as {_EXAMPLES}")


def _head_bounds(edges: str, value: str, activeness: IntArray) -> tuple[int, ...]:
    try:
        share = float(value)
    except ValueError:
        raise _unknown(edges) from None
    if not 0 < share < 1:
        raise StrataError(
            f"strata {edges!r}: expected a share of head users between 0 and 1, got {value}; "
            'for instance "head:0.2"'
        )
    return (_border(activeness, 1 - share),)


def _quantile_bounds(edges: str, value: str, activeness: IntArray) -> tuple[int, ...]:
    try:
        num_strata = int(value)
    except ValueError:
        raise _unknown(edges) from None
    if num_strata < 2:
        raise StrataError(f"strata {edges!r}: expected at least 2 strata; for instance quantile:2")
    return tuple(_border(activeness, j / num_strata) for j in range(1, num_strata))


def _border(activeness: IntArray, share: float) -> int:
    # The least whole number above the quantile: users on the quantile stay below, all of them.
    return math.floor(float(np.quantile(activeness, share)) + _ROUNDING) + 1


def _check_populated(spec: str, bounds: tuple[int, ...], activeness: IntArray) -> None:
    counts = _user_counts(bounds, activeness)
    if counts.all():
        return
    empty = int(np.flatnonzero(counts == 0)[0])
    low, high = int(activeness.min()), int(activeness.max())
    borders = ", ".join(map(str, bounds))
    raise StrataError(
        f"strata {spec!r}: stratum {empty} of {len(counts)} has no user (lower edges {borders}; "
        f"users have {low}-{high} training events); {_fix(spec, activeness)}"
    )


def _user_counts(bounds: tuple[int, ...], activeness: IntArray) -> IntArray:
    return np.bincount(_route(bounds, activeness), minlength=len(bounds) + 1)


def _fix(spec: str, activeness: IntArray) -> str:
    kind, _, value = spec.partition(":")
    low, high = int(activeness.min()), int(activeness.max())
    if low == high:
        return "all users are equally active, so this log has no strata"
    if kind == "quantile":
        for fewer in range(int(value) - 1, 1, -1):
            bounds = _quantile_bounds(spec, str(fewer), activeness)
            if _user_counts(bounds, activeness).all():
                return f"equally active users are not parted: use at most quantile:{fewer}"
    return f"choose ascending edges from {low + 1} to {high}, for instance {_example(activeness)}"


def _example(activeness: IntArray) -> str:
    values = np.unique(activeness)
    return str(int(values[len(values) // 2]))


def _names(spec: str, bounds: tuple[int, ...], least: int) -> tuple[str, ...]:
    if spec.startswith("head:"):
        return ("tail", "head")
    lows = (least, *bounds)
    ranges = [_range(a, b - 1) for a, b in itertools.pairwise(lows)]
    return (*ranges, f"{lows[-1]}+ events")


def _range(low: int, high: int) -> str:
    if low == high:
        return f"{low} event" if low == 1 else f"{low} events"
    return f"{low}-{high} events"
