"""Which rows of a batch belong to which stratum: the index that every boundary rule reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pinet_fast.errors import StrataError

if TYPE_CHECKING:
    from collections.abc import Sequence


def repeat_rows(rows: Tensor, times: Tensor) -> Tensor:
    """Return every row as often as ``times`` says, as ``torch.repeat_interleave`` does.

    On a CPU by NumPy: torch starts its thread pool for a hundred numbers, at 100 times the cost.
    """
    if rows.device.type == "cpu":
        return torch.from_numpy(np.repeat(rows.numpy(), times.numpy(), axis=0))
    return torch.repeat_interleave(rows, times)


class RowGroups:
    """Rows of one kind (users, events, or a flattening of them) grouped by stratum.

    Attributes:
        ids: Stratum of every row, int64 [N].
        num_strata: S.
        offsets: Row offsets on the host, S + 1 ints: after sorting by stratum, stratum ``s`` owns
            rows ``offsets[s]`` to ``offsets[s + 1]``.
        order: The stable permutation that sorts rows by stratum, int64 [N], or None where the rows
            are sorted already, which saves every gather.
    """

    __slots__ = ("ids", "num_strata", "offsets", "order")

    def __init__(
        self, ids: Tensor, num_strata: int, offsets: tuple[int, ...], order: Tensor | None
    ) -> None:
        self.ids = ids
        self.num_strata = num_strata
        self.offsets = offsets
        self.order = order

    @classmethod
    def from_ids(cls, ids: Tensor, num_strata: int) -> RowGroups:
        """Group rows by their stratum ids, int64 [N] in ``0..num_strata-1``."""
        counts = torch.bincount(ids, minlength=num_strata)
        offsets = (0, *torch.cumsum(counts, 0).tolist())
        is_sorted = ids.numel() < 2 or bool((ids[1:] >= ids[:-1]).all())
        order = None if is_sorted else torch.argsort(ids, stable=True)
        return cls(ids, num_strata, offsets, order)

    @property
    def num_rows(self) -> int:
        """Return N."""
        return int(self.offsets[-1])

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the rows of every stratum, S ints."""
        return tuple(b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    def repeated(self, times: int) -> RowGroups:
        """Return the groups of ``N * times`` rows that repeat each row ``times`` times in place."""
        if times == 1:
            return self
        order = self.order
        if order is not None:
            within = torch.arange(times, device=order.device)
            order = (order.unsqueeze(1) * times + within).flatten()
        offsets = tuple(offset * times for offset in self.offsets)
        return RowGroups(self.ids.repeat_interleave(times), self.num_strata, offsets, order)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Split [N, ...] into S tensors, one a stratum; views where the rows are sorted."""
        if self.order is not None:
            rows = rows.index_select(0, self.order)
        return [rows[a:b] for a, b in zip(self.offsets, self.offsets[1:], strict=False)]


class StrataIndex:
    """Strata of the users of one batch and, with ``lengths``, of its events.

    Args:
        ids: Stratum of every user, int64 [B], in any order; sorted ids take the faster path.
        num_strata: S; ids run from 0 (least active) to S - 1 (most active).
        lengths: Events of every user, int64 [B], for a ragged batch of T = sum of lengths events
            laid out user after user. None where rows are users only.
        user_counts: Users of every stratum in the population (not in the batch), S numbers;
            ``Backdoor(prior="users")`` needs them.
        event_counts: Training events of every stratum in the population, S numbers, for
            ``Backdoor(prior="events")``.

    Raises:
        StrataError: Ids out of range, not integers, not one-dimensional; counts or lengths of
            another size.
    """

    def __init__(
        self,
        ids: Tensor | Sequence[int],
        num_strata: int,
        lengths: Tensor | Sequence[int] | None = None,
        user_counts: Sequence[int] | None = None,
        event_counts: Sequence[int] | None = None,
    ) -> None:
        self.num_strata = int(num_strata)
        if self.num_strata < 1:
            raise StrataError(f"StrataIndex: num_strata must be at least 1, got {num_strata}")
        self.ids = _checked_ids(torch.as_tensor(ids), self.num_strata)
        self.lengths = _checked_lengths(lengths, self.ids)
        self.user_counts = _checked_counts("user_counts", user_counts, self.num_strata)
        self.event_counts = _checked_counts("event_counts", event_counts, self.num_strata)
        self.users = RowGroups.from_ids(self.ids, self.num_strata)
        self.events: RowGroups | None = None
        if self.lengths is not None:
            event_ids = repeat_rows(self.ids, self.lengths)
            self.events = RowGroups.from_ids(event_ids, self.num_strata)

    @property
    def num_users(self) -> int:
        """Return B."""
        return self.users.num_rows

    @property
    def num_events(self) -> int | None:
        """Return T, or None where no lengths were given."""
        return None if self.events is None else self.events.num_rows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StrataIndex:
        """Return this index on ``device``; itself where it is there already."""
        if self.ids.device == torch.device(device):
            return self
        moved = object.__new__(StrataIndex)
        moved.__dict__.update(self.__dict__)
        moved.ids = self.ids.to(device, non_blocking=non_blocking)
        if self.lengths is not None:
            moved.lengths = self.lengths.to(device, non_blocking=non_blocking)
        moved.users = _moved(self.users, device, non_blocking)
        moved.events = None if self.events is None else _moved(self.events, device, non_blocking)
        return moved

    def __repr__(self) -> str:
        events = "" if self.events is None else f", events={self.events.counts}"
        return f"StrataIndex(S={self.num_strata}, users={self.users.counts}{events})"


def _moved(groups: RowGroups, device: torch.device | str, non_blocking: bool) -> RowGroups:
    order = groups.order
    if order is not None:
        order = order.to(device, non_blocking=non_blocking)
    ids = groups.ids.to(device, non_blocking=non_blocking)
    return RowGroups(ids, groups.num_strata, groups.offsets, order)


def _checked_ids(ids: Tensor, num_strata: int) -> Tensor:
    if ids.dim() != 1:
        raise StrataError(
            f"strata: expected one stratum id a user, int64 [B]; got shape {list(ids.shape)}; "
            "pass strata.flatten() if there is one for each user"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise StrataError(
            f"strata: expected integer ids, got {ids.dtype}; use strata.long() if they are whole"
        )
    ids = ids.long()
    if ids.numel():
        low, high = (int(v) for v in torch.stack(torch.aminmax(ids)))
        if low < 0 or high >= num_strata:
            bad = low if low < 0 else high
            raise StrataError(
                f"strata: id {bad} is out of range for {num_strata} strata (0..{num_strata - 1}); "
                f"pass num_strata={max(high, 0) + 1} or mend the ids"
            )
    return ids


def _checked_lengths(lengths: Tensor | Sequence[int] | None, ids: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths, device=ids.device).long()
    if lengths.shape != ids.shape:
        raise StrataError(
            f"lengths: expected one length a user, [{ids.numel()}]; got {list(lengths.shape)}; "
            "pass the events of each user, as in mask.sum(1)"
        )
    if lengths.numel() and int(lengths.min()) < 0:
        raise StrataError(
            f"lengths: expected numbers >= 0, got {int(lengths.min())}; pass mask.sum(1)"
        )
    return lengths


def _checked_counts(
    name: str, counts: Sequence[int] | None, num_strata: int
) -> tuple[int, ...] | None:
    if counts is None:
        return None
    values = tuple(int(c) for c in counts)
    if len(values) != num_strata or min(values) < 0:
        raise StrataError(
            f"{name}: expected {num_strata} numbers >= 0, one a stratum; got {list(values)}"
        )
    return values
