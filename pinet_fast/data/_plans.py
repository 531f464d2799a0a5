"""Which places of which permutation make a batch, in closed form from its number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pinet_fast.data._quotas import Diffusion

IntArray = npt.NDArray[np.int64]

_GOLDEN = (math.sqrt(5) - 1) / 2


class Draw(NamedTuple):
    """Some places of the permutation of a stratum in one of its cycles."""

    stratum: int
    cycle: int
    places: range


class Segments(NamedTuple):
    """Where places lie, if a stratum is permuted in segments; int64 arrays [B]."""

    numbers: IntArray
    starts: IntArray
    sizes: IntArray
    positions: IntArray


class Plan(Protocol):
    """The batches of every epoch."""

    num_batches: int

    def draws(self, epoch: int, step: int) -> Iterator[Draw]:
        """Yield what a batch consists of, by ascending stratum."""
        ...

    def segments(self, stratum: int, places: IntArray) -> Segments:
        """Return the segments of places, for batches of bounded events."""
        ...


class Deal:
    """Every user once an epoch, each stratum in proportion.

    The last, partial batch takes evenly spaced places of the list of all users by stratum; the
    rest of that list is dealt to the F full batches like cards, so that each gets the floor or the
    ceiling of every stratum. Merging the strata into one evenly spaced stream and cutting it would
    be off by up to two users at eight strata. Dealing alone would give the odd users of a stratum
    to neighbouring batches, hence a fixed golden-ratio stride from batch to hand.

    A segment is what F neighbours of the list have of one stratum: a batch takes one user of every
    F, so it is bounded by the sum of their longest.

    Args:
        counts: Users of the strata, int64 [S].
        num_full: Full batches, F.
        num_last: Users of the last, partial batch; 0 for none.
        drop_last: Whether to leave it out.
    """

    def __init__(
        self, counts: IntArray, num_full: int, num_last: int = 0, drop_last: bool = False
    ) -> None:
        total = int(counts.sum())
        self._starts = np.concatenate(([0], np.cumsum(counts)))
        # Place i of the last batch is number floor((2i + 1) N / 2r) in the list of all users.
        spaced = (2 * np.arange(num_last) + 1) * total // (2 * max(num_last, 1))
        of_stratum = np.searchsorted(self._starts, spaced, side="right") - 1
        dealt = counts - np.bincount(of_stratum, minlength=len(counts))
        self._counts, self._dealt = counts.tolist(), dealt.tolist()
        self._deal_starts = (np.cumsum(dealt) - dealt).tolist()
        self._num_full = num_full
        self._stride = _golden_stride(num_full)
        self.num_batches = num_full + (1 if num_last and not drop_last else 0)

    def draws(self, epoch: int, step: int) -> Iterator[Draw]:
        """Yield what a batch consists of, by ascending stratum."""
        for s, (dealt, start) in enumerate(zip(self._dealt, self._deal_starts, strict=True)):
            if step == self._num_full:
                yield Draw(s, epoch, range(dealt, self._counts[s]))
            else:
                hand = step * self._stride % self._num_full
                first = (hand - start) % self._num_full
                yield Draw(s, epoch, range(first, dealt, self._num_full))

    def segments(self, stratum: int, places: IntArray) -> Segments:
        """Return the segments of places; there must be no partial batch."""
        low, high = self._starts[stratum], self._starts[stratum + 1]
        numbers = (low + places) // self._num_full
        starts = np.maximum(numbers * self._num_full, low) - low
        ends = np.minimum((numbers + 1) * self._num_full, high) - low
        return Segments(numbers, starts, ends - starts, places - starts)


class Stream:
    """Every stratum by its share; each goes through its users again and again.

    Row k of the stream of all batches belongs to a stratum by error diffusion, and the rows of a
    stratum run through one permutation of its users after the other.

    A segment is one of P even parts of a stratum, P the most rows it has in a batch: neighbouring
    places are in neighbouring segments, so that a batch is bounded by the sum of their longest.

    Args:
        counts: Users of the strata, int64 [S].
        diffusion: Divides the rows.
        batch_size: Rows of a batch.
        num_batches: Batches of an epoch.
        most: Most rows of every stratum in a batch; only for segments.
    """

    def __init__(
        self,
        counts: IntArray,
        diffusion: Diffusion,
        batch_size: int,
        num_batches: int,
        most: list[int] | None = None,
    ) -> None:
        self.num_batches = num_batches
        self._counts = counts.tolist()
        self._diffusion = diffusion
        self._batch_size = batch_size
        self._most = most or []

    def draws(self, epoch: int, step: int) -> Iterator[Draw]:
        """Yield what a batch consists of, by ascending stratum and cycle."""
        row = (epoch * self.num_batches + step) * self._batch_size
        firsts = self._diffusion.counts(row)
        ends = self._diffusion.counts(row + self._batch_size)
        for s, (place, end, count) in enumerate(zip(firsts, ends, self._counts, strict=True)):
            while place < end:
                cycle, first = divmod(place, count)
                size = min(end - place, count - first)
                yield Draw(s, cycle, range(first, first + size))
                place += size

    def segments(self, stratum: int, places: IntArray) -> Segments:
        """Return the segments of places."""
        count = self._counts[stratum]
        parts = min(self._most[stratum], count)
        numbers, positions = places % parts, places // parts
        starts = part_starts(count, parts, numbers)
        return Segments(numbers, starts, part_starts(count, parts, numbers + 1) - starts, positions)


def part_starts(count: int, parts: int, numbers: IntArray) -> IntArray:
    """Return where parts of a list begin; the first ``count % parts`` have one user more."""
    size, larger = divmod(count, parts)
    starts: IntArray = numbers * size + np.minimum(numbers, larger)
    return starts


def _golden_stride(num_full: int) -> int:
    stride = max(1, round(num_full * _GOLDEN))
    while math.gcd(stride, max(num_full, 1)) != 1:
        stride += 1
    return stride
