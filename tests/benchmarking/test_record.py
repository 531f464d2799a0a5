"""Options of ``pytest benchmarks/`` and the files that a run leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ONE_BENCHMARK = ["benchmarks/test_rules.py", "-k", "balanced and 4"]

SUITE = """
import time
import pytest


def test_pair(paired, benchmark):
    benchmark.group = "sleep"
    result = paired(
        lambda: time.sleep(0.002), lambda: time.sleep(0.001), rounds=3,
        bytes=10, reference_bytes=20, floor_s=0.001, check=lambda: None,
    )
    benchmark.extra_info["own"] = 3


@pytest.mark.parametrize("peer", ["nobody"])
def test_absent(peer, paired):
    pytest.skip(f"{peer} is not installed")


def test_wrong(paired):
    def check():
        raise AssertionError("the result is wrong")

    paired(lambda: None, lambda: None, check=check)
"""


def pytest_of(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)


def test_a_run_leaves_one_file_with_figures_skips_and_failures(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import *\n")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {REPOSITORY}\n")
    own, theirs = tmp_path / "results" / "own.json", tmp_path / "theirs.json"
    done = pytest_of(
        tmp_path, "--paired-json", own, "--paired-command", "make it", "--benchmark-json", theirs
    )
    assert "1 failed, 1 passed, 1 skipped" in done.stdout

    record = json.loads(own.read_text())
    assert record["command"] == "make it"
    assert record["versions"]["torch"]
    assert record["machine"]["device"]
    assert set(record["commit"]) == {"id", "dirty"}
    assert record["skipped"] == [
        {"name": "test_suite.py::test_absent[nobody]", "reason": "nobody is not installed"}
    ]
    assert record["failed"] == ["test_suite.py::test_wrong"]
    (result,) = record["results"]
    assert (result["name"], result["group"], result["own"]) == (
        "test_suite.py::test_pair", "sleep", 3,
    )  # fmt: skip
    assert 1 < result["ratio"] < 4
    assert result["low"] <= result["ratio"] <= result["high"]
    assert 0 < result["eta"] < 1
    assert result["rounds"] == 3
    assert "test_wrong" not in "".join(line for line in done.stdout.splitlines() if "ms)" in line)

    known = json.loads(theirs.read_text())
    assert known["machine_info"]["pinet_fast"]["versions"] == record["versions"]
    assert known["benchmarks"][0]["extra_info"]["ratio"] > 1
    assert known["benchmarks"][0]["group"] == "sleep"


def test_the_folder_alone_measures_and_beside_the_tests_it_does_not(tmp_path: Path) -> None:
    measured, checked = tmp_path / "measured.json", tmp_path / "checked.json"
    done = pytest_of(*ONE_BENCHMARK, "--benchmark-json", measured)
    assert "1 passed" in done.stdout, done.stdout
    assert len(json.loads(measured.read_text())["benchmarks"]) == 1
    done = pytest_of("tests/test_layering.py", *ONE_BENCHMARK, "--benchmark-json", checked)
    assert "1 passed" in done.stdout, done.stdout
    assert not checked.exists() or not checked.read_text()
