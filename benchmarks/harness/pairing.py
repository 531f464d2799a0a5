"""Ratios from interleaved pairs, which hold on noisy machines.

Medians of blocks measured one after the other swing by tens of percent on shared machines; the
median of ratios of neighbours stays within one or two.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_RESAMPLES = 1000
_WARM_UP = 3


@dataclass(frozen=True)
class Precision:
    """When an adaptive measurement ends.

    Attributes:
        half_width: Half the interval over the ratio that is narrow enough.
        seconds: Wall time after which it ends whatever the interval.
        least: Rounds that are measured in any case, so that no lucky start ends it.
        limit: A ratio to decide about: the interval need not be narrow but lie on one side of it.
    """

    half_width: float
    seconds: float
    least: int = 20
    limit: float | None = None

    def is_reached(self, rounds: int, ratio: float, low: float, high: float) -> bool:
        """Return whether the interval after so many rounds says enough."""
        if rounds < self.least:
            return False
        if self.limit is not None:
            return not low <= self.limit <= high
        return (high - low) / 2 / ratio <= self.half_width


@dataclass(frozen=True)
class PairedResult:
    """Candidate's time over the reference's.

    Attributes:
        ratio: Median of the paired ratios.
        low: Lower end of its 95% bootstrap interval.
        high: Upper end.
        candidate_ms: Median of the candidate, for orientation only.
        reference_ms: Median of the reference, for orientation only.
        rounds: Pairs measured.
        bytes: Bytes that a call of the candidate must move, where they are known.
        reference_bytes: Bytes that a call of the reference moves, where they are known.
        floor_ms: The least that a call of the candidate can take here, where it is known.
    """

    ratio: float
    low: float
    high: float
    candidate_ms: float
    reference_ms: float
    rounds: int = 0
    bytes: int | None = None
    reference_bytes: int | None = None
    floor_ms: float | None = None

    @property
    def eta(self) -> float | None:
        """Return the floor over the measured time: 1 cannot be beaten."""
        return None if self.floor_ms is None else self.floor_ms / self.candidate_ms

    @property
    def gb_per_s(self) -> float | None:
        """Return the bytes that the candidate must move over its time."""
        return None if self.bytes is None else self.bytes / self.candidate_ms / 1e6

    @property
    def share_of_bandwidth(self) -> float | None:
        """Return the candidate's bytes a second over the reference's, from the paired ratio."""
        if self.bytes is None or self.reference_bytes is None:
            return None
        return self.bytes / self.reference_bytes / self.ratio

    def facts(self) -> dict[str, Any]:
        """Return what is known, for a record."""
        known = asdict(self) | {
            "eta": self.eta, "gb_per_s": self.gb_per_s,
            "share_of_bandwidth": self.share_of_bandwidth,
        }  # fmt: skip
        return {name: value for name, value in known.items() if value is not None}

    def __str__(self) -> str:
        text = (
            f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}] "
            f"({self.candidate_ms:.3g} / {self.reference_ms:.3g} ms)"
        )
        if self.eta is not None:
            text += f", eta {self.eta:.2f}"
        if self.share_of_bandwidth is not None:
            text += f", {self.share_of_bandwidth:.2f} of the reference's bandwidth"
        return text


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the ratios and its 95% bootstrap interval, the same at every call."""
    values = np.asarray(ratios, float)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (_RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def measure(
    candidate: Callable[[], Any],
    reference: Callable[[], Any],
    rounds: int,
    *,
    precision: Precision | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedResult:
    """Alternate both, each first in every other round, garbage collection off.

    Args:
        candidate: What is judged.
        reference: What it is judged by.
        rounds: Pairs to measure; with ``precision``, pairs between two looks at the interval.
        precision: Goes on until the interval is narrow enough or the time is used up.
        clock: Seconds; ``time.process_time`` leaves out what other processes took.
    """
    for function in (candidate, reference) * _WARM_UP:
        function()
    pairs: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    started = time.perf_counter()  # a large process is collected for as long as small budgets last
    try:
        while True:
            for _ in range(rounds):
                pairs.append(_pair(candidate, reference, len(pairs), clock))
            ratio, low, high = interval([mine / theirs for mine, theirs in pairs])
            if (
                precision is None
                or precision.is_reached(len(pairs), ratio, low, high)
                or time.perf_counter() - started >= precision.seconds
            ):
                break
    finally:
        gc.enable()
    return PairedResult(
        ratio, low, high,
        statistics.median(mine for mine, _ in pairs) * 1e3,
        statistics.median(theirs for _, theirs in pairs) * 1e3,
        len(pairs),
    )  # fmt: skip


def _pair(
    candidate: Callable[[], Any],
    reference: Callable[[], Any],
    number: int,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Return the candidate's and the reference's seconds."""
    if number % 2:
        theirs = _seconds(reference, clock)
        return _seconds(candidate, clock), theirs
    mine = _seconds(candidate, clock)
    return mine, _seconds(reference, clock)


def _seconds(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    function()
    return clock() - started
