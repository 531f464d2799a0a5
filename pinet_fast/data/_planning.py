"""Builds the plan of an epoch: how many batches, and how many users or events in each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from pinet_fast.data._plans import Deal, Plan, Stream, part_starts
from pinet_fast.data._quotas import Diffusion
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from fractions import Fraction

IntArray = npt.NDArray[np.int64]


class SizedPlan(NamedTuple):
    """A plan, and the users of its largest and smallest batch."""

    plan: Plan
    largest: int
    smallest: int


def deal(
    counts: IntArray, lengths: Sequence[IntArray] | None, limit: int, drop_last: bool
) -> SizedPlan:
    """Plan every user once.

    Args:
        counts: Users of the strata, int64 [S].
        lengths: Events of the users of every stratum, ascending in each, if events are limited.
        limit: Users of a batch, or with ``lengths`` its most events.
        drop_last: Whether to leave a partial batch out.

    Raises:
        ConfigError: No batch is left, or a user alone has more events.
    """
    total = int(counts.sum())
    if lengths is not None:
        num_batches = fewest_batches(lengths, limit)
        return SizedPlan(Deal(counts, num_batches), -(-total // num_batches), total // num_batches)
    num_full, rest = divmod(total, limit)
    if not num_full and drop_last:
        raise ConfigError(
            f"batch_size: {limit:,} with drop_last leaves no batch of {total:,} "
            "users; lower batch_size or keep the last batch"
        )
    plan = Deal(counts, num_full, rest, drop_last)
    return SizedPlan(plan, limit, limit if drop_last or not rest else rest)


def stream(
    counts: IntArray,
    lengths: Sequence[IntArray] | None,
    shares: Sequence[Fraction],
    limit: int,
    drop_last: bool,
    num_batches: int | None,
) -> SizedPlan:
    """Plan batches of given shares.

    Args:
        counts: As in ``deal``.
        lengths: As in ``deal``.
        shares: Shares of the strata.
        limit: As in ``deal``.
        drop_last: Whether to count full batches of all users only.
        num_batches: Batches of an epoch; None for as many as hold all users.

    Raises:
        ConfigError: A batch of one user may have more events.
    """
    diffusion = Diffusion(shares)
    size, most = limit, None
    if lengths is not None:
        bounds = diffusion.bounds()
        size = largest_batch(lengths, shares, bounds, limit)
        most = most_rows(shares, bounds, size)
    if num_batches is None:
        full, rest = divmod(int(counts.sum()), size)
        num_batches = max(1, full + (rest > 0 and not drop_last))
    return SizedPlan(Stream(counts, diffusion, size, num_batches, most), size, size)


def fewest_batches(lengths: Sequence[IntArray], max_events: int) -> int:
    """Return how many batches hold every user once within ``max_events`` events each.

    Args:
        lengths: Events of the users of every stratum, ascending in each.
        max_events: Most events of a batch.

    Raises:
        ConfigError: A user alone has more.
    """
    everyone = np.concatenate(lengths)
    longest = int(everyone.max())
    if longest > max_events:
        raise ConfigError(
            f"max_events: a user has {longest:,} events and a batch at most {max_events:,}; "
            "raise max_events or lower max_len"
        )

    def fits(num_batches: int) -> bool:
        # A batch takes one of every num_batches neighbours: at worst, the longest of each.
        firsts = np.arange(0, len(everyone), num_batches)
        return int(np.maximum.reduceat(everyone, firsts).sum()) <= max_events

    # One batch a user fits; fewer than the mean asks for do not.
    return _least(fits, -(-int(everyone.sum()) // max_events), len(everyone))


def largest_batch(
    lengths: Sequence[IntArray],
    shares: Sequence[Fraction],
    bounds: Sequence[Fraction],
    max_events: int,
) -> int:
    """Return the users of a batch of given shares that stays within ``max_events`` events.

    Args:
        lengths: As in ``fewest_batches``.
        shares: Shares of the strata.
        bounds: How far the rows of a stratum may be from their due, as of ``Diffusion.bounds``.
        max_events: Most events of a batch.

    Raises:
        ConfigError: A batch of one user may have more.
    """

    def worst(batch_size: int) -> int:
        most = most_rows(shares, bounds, batch_size)
        return sum(_worst_window(a, n) for a, n in zip(lengths, most, strict=True))

    if worst(1) > max_events:
        raise ConfigError(
            f"max_events: expected at least {worst(1):,}, what one user of each stratum may have, "
            f"got {max_events:,}; raise max_events or lower max_len"
        )
    return _least(lambda size: worst(size + 1) > max_events, 1, max_events)


def most_rows(shares: Sequence[Fraction], bounds: Sequence[Fraction], batch_size: int) -> list[int]:
    """Return the most rows that any batch may have of every stratum."""
    # A count is never off by its bound on both sides, so two differ by less than twice the bound.
    return [
        max(int(share * batch_size), math.ceil(share * batch_size + 2 * bound) - 1)
        for share, bound in zip(shares, bounds, strict=True)
    ]


def _worst_window(lengths: IntArray, rows: int) -> int:
    # Place p of a cycle is in part p % rows. Rows in a row are one of each part, but where a cycle
    # ends inside a part's round, its tail and the next head meet.
    cycles, rows = divmod(rows, len(lengths))
    whole = cycles * int(lengths.sum())
    if cycles or not rows:
        return whole + int(lengths[len(lengths) - rows :].sum())
    longest = lengths[part_starts(len(lengths), rows, np.arange(rows) + 1) - 1]
    tail = (len(lengths) - rows + np.arange(rows)) % rows
    sums = np.concatenate(([0], np.cumsum(np.concatenate((longest[tail], longest)))))
    return int((sums[rows:] - sums[:-rows]).max())


def _least(holds: Callable[[int], bool], low: int, high: int) -> int:
    # Bisects as if `holds` never became false again; where it does, the result still holds.
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
