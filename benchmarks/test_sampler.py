"""The sampler at 200 million users: state, seek, and the price of an order without memory."""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pinet_fast import Strata, StratifiedBatchSampler
from pinet_fast.data._order import order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

USERS = 200_000_000
BATCH = 4096
STATE_LIMIT_US = 10.0
SEEK_LIMIT_MS = 1.0


def _strata(users: int) -> Strata:
    """Make five strata of unequal sizes, without a store."""
    sizes = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    borders = np.cumsum(sizes * users).astype(np.int64)
    # A multiplication spreads the strata over the row numbers; random ones would take minutes.
    places = np.arange(users, dtype=np.int64)
    places *= 7_368_787
    places %= users
    ids = np.searchsorted(borders[:-1], places, side="right")
    np.multiply(ids, 20, out=places)
    places += 2
    return Strata(
        spec="synthetic",
        edges=(20, 40, 60, 80),
        names=tuple("abcde"),
        activeness=places,
        ids=ids,
        store_fingerprint="synthetic",
        fingerprint=f"synthetic {users}",
    )


@pytest.fixture(scope="module")
def strata(request: pytest.FixtureRequest) -> Iterator[Strata]:
    """Return 200 million users, or 200 thousand where benchmarks are merely checked."""
    yield _strata(USERS // 1000 if request.config.getoption("benchmark_disable") else USERS)
    gc.collect()


def _median_seconds(function: Callable[[int], Any], rounds: int) -> float:
    times = []
    for i in range(rounds):
        started = time.perf_counter()
        function(i)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def test_state_dict(strata: Strata, benchmark: Any) -> None:
    benchmark.group = "sampler"
    sampler = StratifiedBatchSampler(strata, batch_size=BATCH)
    next(iter(sampler))
    us = _median_seconds(lambda _: sampler.state_dict(), 1000) * 1e6
    benchmark.extra_info.update(us=us, users=len(strata.ids), limit_us=STATE_LIMIT_US)
    benchmark(sampler.state_dict)
    assert us < STATE_LIMIT_US


@pytest.mark.parametrize("mix", ["proportional", "uniform"])
@pytest.mark.parametrize("batch_size", [256, BATCH])
def test_seek(strata: Strata, benchmark: Any, mix: str, batch_size: int) -> None:
    """Load a state somewhere in some epoch and draw its batch, as a resumed run does first."""
    benchmark.group = "sampler"
    sampler = StratifiedBatchSampler(strata, batch_size=batch_size, mix=mix)
    rng = np.random.default_rng(0)
    positions = rng.integers(0, (50, len(sampler) - 1), (300, 2)).tolist()

    def seek(i: int) -> None:
        epoch, step = positions[i % len(positions)]
        sampler.load_state_dict(sampler.state_dict() | {"epoch": epoch, "step": step})
        assert len(next(iter(sampler))) == batch_size

    seek(0)
    ms = _median_seconds(seek, len(positions)) * 1e3
    benchmark.extra_info.update(ms=ms, users=len(strata.ids), limit_ms=SEEK_LIMIT_MS)
    benchmark.pedantic(seek, args=(1,), rounds=5)
    assert ms < SEEK_LIMIT_MS


@pytest.mark.parametrize("users", [1_500_000, 20_000_000])
def test_order_over_a_permutation_in_memory(
    paired: Callable[..., Any], benchmark: Any, users: int
) -> None:
    """An epoch in batches: a keyed order, against drawing a permutation and indexing into it."""
    benchmark.group = "sampler"
    places = np.arange(users)
    batches = [places[first : first + BATCH] for first in range(0, users, BATCH)]
    rng = np.random.default_rng(0)

    def keyed() -> None:
        for batch in batches:
            order(0, 1, 2, users, batch)

    def in_memory() -> None:
        permutation = rng.permutation(users)
        for batch in batches:
            permutation[batch]

    result = paired(keyed, in_memory, rounds=10)
    benchmark.extra_info.update(
        ns_per_index=result.candidate_ms * 1e6 / users,
        reference_ns_per_index=result.reference_ms * 1e6 / users,
        reference_bytes_per_user=8,
    )
