"""The ``paired`` fixture: ratios from interleaved pairs, which hold on noisy machines.

Medians of blocks measured one after the other swing by tens of percent on shared machines; the
median of ratios of neighbours stays within one or two.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class PairedResult:
    """Candidate's time over the reference's.

    Attributes:
        ratio: Median of the paired ratios.
        low: Lower end of its 95% bootstrap interval.
        high: Upper end.
        candidate_ms: Median of the candidate, for orientation only.
        reference_ms: Median of the reference, for orientation only.
        best: Ratio of the lower deciles of both: what is left of the ratio where other work on the
            machine interrupts the longer of the two far more often.
    """

    ratio: float
    low: float
    high: float
    candidate_ms: float
    reference_ms: float
    best: float


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(
    candidate: Callable[[], Any], reference: Callable[[], Any], rounds: int
) -> PairedResult:
    """Alternate both, each first in every other round, garbage collection off."""
    pairs = []
    for function in (candidate, reference) * 3:
        function()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            if i % 2:
                theirs, mine = _seconds(reference), _seconds(candidate)
            else:
                mine, theirs = _seconds(candidate), _seconds(reference)
            pairs.append((mine, theirs))
    finally:
        gc.enable()
    ratios = np.array([mine / theirs for mine, theirs in pairs])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (1000, rounds)), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return PairedResult(
        float(np.median(ratios)),
        float(low),
        float(high),
        statistics.median(mine for mine, _ in pairs) * 1e3,
        statistics.median(theirs for _, theirs in pairs) * 1e3,
        float(np.divide(*np.quantile(np.array(pairs), 0.1, axis=0))),
    )


@pytest.fixture
def paired(
    benchmark: Any, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Callable[..., PairedResult]:
    """Return ``run(candidate, reference, rounds=40)``; the result goes into ``extra_info``."""

    def run(
        candidate: Callable[[], Any], reference: Callable[[], Any], rounds: int = 40
    ) -> PairedResult:
        if benchmark.disabled:  # correctness of the benchmark only
            rounds = 2
        result = measure(candidate, reference, rounds)
        benchmark.extra_info.update(
            ratio=result.ratio,
            low=result.low,
            high=result.high,
            candidate_ms=result.candidate_ms,
            reference_ms=result.reference_ms,
            best=result.best,
            machine=platform.machine(),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        )
        benchmark.pedantic(candidate, rounds=3, iterations=1)
        with capsys.disabled():
            print(
                f"\n{request.node.name}: {result.ratio:.3f} "
                f"[{result.low:.3f}, {result.high:.3f}] "
                f"({result.candidate_ms:.2f} / {result.reference_ms:.2f} ms; "
                f"lower deciles {result.best:.3f})"
            )
        return result

    return run
