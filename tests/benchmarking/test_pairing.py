"""Paired ratios: what is measured, when it ends, and what a record says of it."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness.pairing import PairedResult, Precision, interval, measure

if TYPE_CHECKING:
    from collections.abc import Callable


class Work:
    """Functions that cost what they are told on a clock of their own."""

    def __init__(self, seed: int = 0, noise: float = 0.0) -> None:
        self.now = 0.0
        self.order: list[str] = []
        self._random, self._noise = random.Random(seed), noise

    def clock(self) -> float:
        return self.now

    def costing(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.order.append(name)
            self.now += seconds * (1 + self._noise * self._random.random())

        return call


@settings(max_examples=20, deadline=None)
@given(ratio=st.floats(0.2, 5), rounds=st.integers(2, 30))
def test_a_ratio_of_costs_is_found(ratio: float, rounds: int) -> None:
    work = Work()
    result = measure(
        work.costing("mine", 1e-3 * ratio), work.costing("theirs", 1e-3), rounds, clock=work.clock
    )
    assert result.ratio == pytest.approx(ratio, rel=1e-6)
    assert result.low == pytest.approx(ratio, rel=1e-6)
    assert result.high == pytest.approx(ratio, rel=1e-6)
    assert result.candidate_ms == pytest.approx(ratio, rel=1e-6)
    assert result.reference_ms == pytest.approx(1.0, rel=1e-6)
    assert result.rounds == rounds


def test_sides_alternate_and_each_is_first_in_every_other_round() -> None:
    work = Work()
    measure(work.costing("a", 1.0), work.costing("b", 1.0), 4, clock=work.clock)
    assert "".join(work.order) == "ababab" + "abbaabba"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=40))
def test_the_interval_holds_the_median_and_repeats_itself(ratios: list[float]) -> None:
    ratio, low, high = interval(ratios)
    assert min(ratios) <= low <= ratio <= high <= max(ratios)
    assert interval(ratios) == (ratio, low, high)


def test_noise_widens_the_interval_and_adaptive_rounds_narrow_it() -> None:
    def width(noise: float, precision: Precision | None) -> tuple[float, int]:
        work = Work(noise=noise)
        result = measure(
            work.costing("mine", 1.1), work.costing("theirs", 1.0), 20,
            precision=precision, clock=work.clock,
        )  # fmt: skip
        assert result.ratio == pytest.approx(1.1, rel=noise)
        return (result.high - result.low) / 2 / result.ratio, result.rounds

    calm, _ = width(0.01, None)
    noisy, few = width(0.5, None)
    assert calm < 0.01 < 0.03 < noisy
    narrowed, many = width(0.5, Precision(half_width=0.02, seconds=60))
    assert narrowed <= 0.02
    assert many > few == 20


@pytest.mark.parametrize(("cost", "is_above"), [(1.2, True), (1.0, False)])
def test_a_limit_is_decided_before_the_interval_is_narrow(cost: float, is_above: bool) -> None:
    work = Work(noise=0.2)
    result = measure(
        work.costing("mine", cost), work.costing("theirs", 1.0), 5, clock=work.clock,
        precision=Precision(half_width=0.0, seconds=60, least=10, limit=1.1),
    )  # fmt: skip
    assert (result.low > 1.1) == is_above
    assert (result.high < 1.1) != is_above
    assert result.rounds >= 10


def test_an_adaptive_measurement_ends_when_its_time_is_used_up() -> None:
    started = time.perf_counter()
    result = measure(
        lambda: time.sleep(0.002), lambda: time.sleep(0.001), 2,
        precision=Precision(half_width=0.0, seconds=0.5, least=2),
    )  # fmt: skip
    assert 0.5 <= time.perf_counter() - started < 10
    assert result.rounds > 2


def test_bytes_and_floors_become_shares() -> None:
    bare = PairedResult(2.0, 1.9, 2.1, 4.0, 2.0, rounds=9)
    assert (bare.eta, bare.gb_per_s, bare.share_of_bandwidth) == (None, None, None)
    assert set(bare.facts()) == {"ratio", "low", "high", "candidate_ms", "reference_ms", "rounds"}
    full = PairedResult(
        2.0, 1.9, 2.1, 4.0, 2.0, bytes=8_000_000, reference_bytes=8_000_000, floor_ms=1.0
    )
    assert full.eta == 0.25
    assert full.gb_per_s == 2.0
    assert full.share_of_bandwidth == 0.5
    assert {"eta", "gb_per_s", "share_of_bandwidth", "bytes", "floor_ms"} <= set(full.facts())
    assert "eta 0.25" in str(full)
