"""Options and the ``paired`` fixture of the benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.harness import machine
from benchmarks.harness.gate import Gate, message
from benchmarks.harness.pairing import PairedResult, measure
from benchmarks.harness.record import Recorder, name_of

if TYPE_CHECKING:
    from collections.abc import Callable

_GATE_SECONDS = 50.0
_RECORDER, _GATE = "pinet_fast recorder", "pinet_fast gate"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("paired ratios")
    group.addoption(
        "--paired-json", type=Path, metavar="FILE",
        help="Write the ratios, who skipped, machine, versions and commit of this run.",
    )  # fmt: skip
    group.addoption(
        "--paired-command", metavar="TEXT", help="The command that the file names; default: this."
    )
    group.addoption(
        "--paired-gate", type=Path, metavar="FILE",
        help="Run the benchmarks named in FILE alone, and fail where a ratio is above what it says",
    )  # fmt: skip
    group.addoption(
        "--paired-gate-seconds", type=float, default=_GATE_SECONDS, metavar="S",
        help="Wall time for the gate's measurements (default: %(default)s).",
    )  # fmt: skip
    group.addoption(
        "--paired-gate-update", action="store_true",
        help="Write what the gate measures into its file instead of judging it.",
    )  # fmt: skip
    group.addoption(
        "--paired-slow-down", type=float, default=0.0, metavar="SHARE",
        help="Make every candidate of the gate slower by this share, to see that it fails.",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    def option(name: str) -> Any:
        return config.getoption(name, None)

    command = option("paired_command") or " ".join(["pytest", *config.invocation_params.args])
    config.pluginmanager.register(Recorder(option("paired_json"), command), _RECORDER)
    if option("paired_gate") is not None:
        gate = Gate(
            option("paired_gate"),
            seconds=option("paired_gate_seconds"),
            slow_down=option("paired_slow_down"),
            update=option("paired_gate_update"),
        )
        config.pluginmanager.register(gate, _GATE)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Put the device and the versions into pytest-benchmark's own JSON too."""
    machine_info["pinet_fast"] = machine.describe() | {"versions": machine.versions()}


@pytest.fixture
def paired(
    benchmark: Any, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Callable[..., PairedResult]:
    """Return ``run(candidate, reference, rounds=40)``; the result goes into ``extra_info``.

    Keywords of ``run``, all optional: ``bytes``, which a call of the candidate must move;
    ``reference_bytes``; ``floor_s``, the least that a call of the candidate can take here, which
    gives eta; ``check``, called before anything is timed, to raise where a result is wrong.
    """
    gate = request.config.pluginmanager.get_plugin(_GATE)
    name = name_of(request.node.nodeid)

    def judged(
        candidate: Callable[[], Any], reference: Callable[[], Any]
    ) -> tuple[PairedResult, bool]:
        result, verdict = gate.judge(name, candidate, reference)
        expected = gate.expectations[name]
        with capsys.disabled():
            print(f"\n{name}: {result}, expected {expected.ratio:.3f}: {verdict}")
        return result, verdict == "slower"

    def run(
        candidate: Callable[[], Any],
        reference: Callable[[], Any],
        rounds: int = 40,
        *,
        bytes: int | None = None,
        reference_bytes: int | None = None,
        floor_s: float | None = None,
        check: Callable[[], Any] | None = None,
    ) -> PairedResult:
        is_slower = False
        if check is not None:
            check()
        if benchmark.disabled:  # correctness of the benchmark only
            result = measure(candidate, reference, 2)
        elif gate is not None:
            result, is_slower = judged(candidate, reference)
        else:
            result = measure(candidate, reference, rounds)
        result = replace(
            result, bytes=bytes, reference_bytes=reference_bytes,
            floor_ms=None if floor_s is None else floor_s * 1e3,
        )  # fmt: skip
        benchmark.extra_info.update(result.facts(), threads=torch.get_num_threads())
        benchmark.pedantic(candidate, rounds=1 if gate else 3, iterations=1)
        if is_slower:
            pytest.fail(message(name, gate.expectations[name], result), pytrace=False)
        if gate is None and not benchmark.disabled:
            with capsys.disabled():
                print(f"\n{request.node.name}: {result}")
        return result

    return run
