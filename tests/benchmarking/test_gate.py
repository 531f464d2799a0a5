"""The gate: passes on a loaded machine, twice in a row, and fails on ten percent more work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.harness import machine
from benchmarks.harness.gate import Expectation, load
from benchmarks.harness.pairing import PairedResult

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[2]

# A step whose work is counted: ten percent more of it is ten percent more, whatever the machine.
SYNTHETIC = """
import os
import torch

WORK = int(os.environ["WORK"])
A, B = torch.randn(64, 64), torch.randn(64, 64)


def step(products):
    for _ in range(products):
        torch.mm(A, B)


def test_synthetic_step(paired, benchmark):
    paired(lambda: step(WORK), lambda: step(1000))


def test_not_gated(paired, benchmark):
    raise AssertionError("no expectation names it")
"""
CONFTEST = "from benchmarks.conftest import *\n"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Return a folder with one gated synthetic benchmark."""
    (tmp_path / "test_synthetic.py").write_text(SYNTHETIC)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {REPOSITORY}\n")
    write(tmp_path, {"test_synthetic.py::test_synthetic_step": {"ratio": 1.0}})
    return tmp_path


@pytest.fixture
def load_on_every_core() -> Iterator[None]:
    """Keep every core busy with other work."""
    code = "while True: sum(range(100000))"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count() or 1)]
    yield
    for process in busy:
        process.kill()
        process.wait()


def write(folder: Path, benchmarks: object, processor: str | None = None) -> None:
    content = {"processors": {processor or machine.processor(): {"benchmarks": benchmarks}}}
    (folder / "expectations.json").write_text(json.dumps(content))


def gate(folder: Path, work: int = 1000, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider",
        "--paired-gate", str(folder / "expectations.json"), "--paired-gate-seconds", "40", *options,
    ]  # fmt: skip
    environment = os.environ | {"WORK": str(work), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_two_runs_in_a_row_pass_under_load(suite: Path, load_on_every_core: None) -> None:
    for _ in range(2):
        done = gate(suite)
        assert done.returncode == 0, done.stdout
        assert "1 passed, 1 deselected" in done.stdout


@pytest.mark.slow
def test_ten_percent_more_work_fails_under_load(suite: Path, load_on_every_core: None) -> None:
    done = gate(suite, 1100)
    assert done.returncode == 1, done.stdout
    assert "slower than committed" in done.stdout
    assert "1 failed, 1 deselected in" in done.stdout


@pytest.mark.slow
def test_a_slow_down_of_the_real_step_fails_and_without_it_the_step_passes(tmp_path: Path) -> None:
    """Noted on this machine first: what is tested is the gate, not the machine."""
    name = "test_step.py::test_aggregated_step[agreement-bce-4]"
    write(tmp_path, {name: {"ratio": 1.0}})
    expectations = tmp_path / "expectations.json"

    def step_gate(*options: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-m", "pytest", str(REPOSITORY / "benchmarks" / "test_step.py"), "-q",
            "-p", "no:cacheprovider", "--paired-gate", str(expectations),
            "--paired-gate-seconds", "40", *options,
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=False)

    noted = step_gate("--paired-gate-update")
    assert noted.returncode == 0, noted.stdout
    assert load(expectations)[name].ratio > 0.5
    unchanged = step_gate()
    assert unchanged.returncode == 0, unchanged.stdout
    slower = step_gate("--paired-slow-down", "0.1")
    assert slower.returncode == 1, slower.stdout
    assert "slower than committed" in slower.stdout


def result(ratio: float, half_width: float) -> PairedResult:
    return PairedResult(ratio, ratio - half_width, ratio + half_width, 1.0, 1.0)


@pytest.mark.parametrize(
    ("ratio", "half_width", "verdict"),
    [
        (1.00, 0.01, "as expected"),
        (1.05, 0.02, "as expected"),  # the interval reaches below the limit
        (1.05, 0.005, "slower"),
        (1.10, 0.05, "slower"),
        (1.10, 0.08, "as expected"),  # too wide to say
        (0.90, 0.01, "faster"),
        (0.97, 0.005, "as expected"),
    ],
)
def test_a_verdict_needs_the_whole_interval(ratio: float, half_width: float, verdict: str) -> None:
    assert Expectation(1.0, margin=0.04).verdict(result(ratio, half_width)) == verdict


def test_a_renamed_benchmark_is_an_error(suite: Path) -> None:
    write(suite, {"test_synthetic.py::test_old_name": {"ratio": 1.0}})
    done = gate(suite)
    assert done.returncode != 0
    assert "no benchmark is called test_synthetic.py::test_old_name" in done.stdout + done.stderr


def test_another_processor_has_expectations_of_its_own(suite: Path) -> None:
    name = "test_synthetic.py::test_synthetic_step"
    write(suite, {name: {"ratio": 0.1}}, "Another, AVX9")
    skipped = gate(suite, 1000, "-rs")
    assert skipped.returncode == 0, skipped.stdout
    assert "1 skipped, 1 deselected" in skipped.stdout
    assert f"has no ratios of {machine.processor()}" in skipped.stdout
    noted = gate(suite, 1000, "--paired-gate-update")
    assert noted.returncode == 0, noted.stdout
    assert load(suite / "expectations.json")[name].ratio > 0.5
    assert load(suite / "expectations.json", "Another, AVX9")[name].ratio == 0.1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"processors": []}',
        '{"processors": {"p": {"benchmarks": {"a": {"seconds": 1}}}}}',
    ],
)
def test_broken_expectations_say_how_to_make_them(tmp_path: Path, content: str) -> None:
    path = tmp_path / "expectations.json"
    path.write_text(content)
    with pytest.raises(pytest.UsageError, match="make expectations"):
        load(path)


def test_committed_expectations_name_the_step() -> None:
    names = load(REPOSITORY / "benchmarks" / "expectations.json", "AMD EPYC, family 26, AVX512")
    assert any(name.startswith("test_step.py::test_aggregated_step[agreement") for name in names)
