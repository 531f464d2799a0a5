"""The gate: fails where a benchmark's whole interval lies above what was committed.

It judges ratios of CPU time on one thread, never seconds: what other processes take is left out,
and what they do to caches and clocks hits both sides of a pair alike. Ratios belong to a processor
all the same (vendors' libraries serve some better than others), so expectations are kept for each.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.harness import machine
from benchmarks.harness.pairing import PairedResult, Precision, measure
from benchmarks.harness.record import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MARGIN = 0.04
"""How far the interval may lie above the expected ratio, where a benchmark names no margin."""

_ROUNDS = 10  # between two looks at the interval
_ATTEMPTS = 2  # a benchmark that fails is measured once more: both must fail


@dataclass(frozen=True)
class Expectation:
    """What a benchmark's ratio is held to.

    Attributes:
        ratio: What was measured when it was committed.
        margin: The share of it by which the interval's lower end may lie above it.
    """

    ratio: float
    margin: float = MARGIN

    @property
    def limit(self) -> float:
        """Return the largest lower end of an interval that passes."""
        return self.ratio * (1 + self.margin)

    def verdict(self, result: PairedResult) -> str:
        """Return ``slower``, ``faster`` or ``as expected``."""
        if result.low > self.limit:
            return "slower"
        return "faster" if result.high < self.ratio * (1 - self.margin) else "as expected"


def load(path: Path, processor: str | None = None) -> dict[str, Expectation]:
    """Return the expectations of a processor in a file, by benchmark; none if it has none.

    Args:
        path: The file.
        processor: As ``machine.processor()`` names it; None = this one.

    Raises:
        pytest.UsageError: The file is missing or holds something else.
    """
    return _read(path).get(processor or machine.processor(), {})


def _read(path: Path) -> dict[str, dict[str, Expectation]]:
    try:
        return {
            processor: {name: Expectation(**e) for name, e in entry["benchmarks"].items()}
            for processor, entry in json.loads(path.read_text())["processors"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise pytest.UsageError(
            f"{path}: expected JSON with processors -> name -> benchmarks -> name -> ratio and "
            f"margin; got {error!r}; make it with `make expectations`"
        ) from None


def slowed(function: Callable[[], Any], share: float, clock: Callable[[], float]) -> Any:
    """Return the function made slower by a share of its own time: the gate must see it."""

    def slow() -> None:
        started = clock()
        function()
        end = clock() + share * (clock() - started)
        while clock() < end:
            pass

    return slow


class Gate:
    """A pytest plugin that keeps the gated benchmarks and judges each.

    Args:
        path: The expectations.
        seconds: Wall time for all measurements together.
        slow_down: Share by which every candidate is made slower, to test the gate.
        update: Writes what was measured into the file instead of judging it.
    """

    def __init__(
        self, path: Path, *, seconds: float, slow_down: float = 0.0, update: bool = False
    ) -> None:
        self.path = path
        self.expectations = load(path)
        self.is_foreign = not self.expectations
        if self.is_foreign:  # nothing is known of this processor: others say what to measure
            self.expectations = {n: e for known in _read(path).values() for n, e in known.items()}
        self.seconds_left = seconds
        self.slow_down = slow_down
        self.update = update
        self.measured: dict[str, PairedResult] = {}
        self.num_left = len(self.expectations)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the benchmarks that have an expectation; refuse names that nothing has."""
        names = {name_of(item.nodeid) for item in items}
        files = {name.split("::")[0] for name in names}
        gone = [n for n in self.expectations if n not in names and n.split("::")[0] in files]
        if gone:
            raise pytest.UsageError(
                f"{self.path}: no benchmark is called {', '.join(gone)}; rename it there, or "
                "delete the entry"
            )
        others = [item for item in items if name_of(item.nodeid) not in self.expectations]
        items[:] = [item for item in items if name_of(item.nodeid) in self.expectations]
        self.num_left = len(items)
        config.hook.pytest_deselected(items=others)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        """Run every gated benchmark on one thread of torch."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return (yield)
        finally:
            torch.set_num_threads(threads)

    def judge(
        self, name: str, candidate: Callable[[], Any], reference: Callable[[], Any]
    ) -> tuple[PairedResult, str]:
        """Measure until the interval lies on one side of the limit or the time is used up.

        Returns:
            What was measured, and whether it is ``slower``, ``faster`` or ``as expected``. Skips
            the benchmark on a processor that the file does not know.
        """
        if self.is_foreign and not self.update:
            pytest.skip(
                f"{self.path.name} has no ratios of {machine.processor()}; `make expectations` "
                "adds them"
            )
        clock = time.process_time
        if self.slow_down:
            candidate = slowed(candidate, self.slow_down, clock)
        expected = self.expectations[name]
        for _ in range(_ATTEMPTS):
            started = time.perf_counter()
            budget = self.seconds_left / max(1, self.num_left)
            precision = Precision(
                half_width=expected.margin / 4,
                seconds=budget / _ATTEMPTS,
                limit=None if self.update else expected.limit,
            )
            result = measure(candidate, reference, _ROUNDS, precision=precision, clock=clock)
            self.seconds_left -= time.perf_counter() - started
            verdict = expected.verdict(result)
            if self.update or verdict != "slower":
                break
        self.num_left -= 1
        self.measured[name] = result
        return result, "noted" if self.update else verdict

    def pytest_sessionfinish(self) -> None:
        """Write what was measured, where that is asked for."""
        if not self.update:
            return
        content = json.loads(self.path.read_text())
        content["processors"][machine.processor()] = {
            "versions": machine.versions(),
            "commit": machine.commit()["id"],
            "benchmarks": {
                name: {"ratio": self._ratio(name), "margin": old.margin}
                for name, old in self.expectations.items()
            },
        }
        self.path.write_text(json.dumps(content, indent=1) + "\n")

    def _ratio(self, name: str) -> float:
        """Return what was measured, or what the file held of a benchmark that did not run."""
        if name not in self.measured:
            return self.expectations[name].ratio
        return round(self.measured[name].ratio, 4)


def message(name: str, expected: Expectation, result: PairedResult) -> str:
    """Return why a benchmark fails the gate."""
    return (
        f"{name}: slower than committed: ratio {result.ratio:.3f}, and its 95% interval "
        f"[{result.low:.3f}, {result.high:.3f}] lies above {expected.limit:.3f} "
        f"(expected {expected.ratio:.3f}, margin {expected.margin:.0%}; measured twice); mend what "
        "became slower, or run `make expectations` and say in the commit why it may be"
    )
