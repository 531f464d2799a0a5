"""Options of ``pytest benchmarks/`` and the files that a run leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.record import joined

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


def test_a_suite_runs_every_file_in_a_process_and_keeps_what_failed(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import *\n")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {REPOSITORY}\n")
    for name in ("test_first.py", "test_second.py", "test_none.py"):
        one = "def test_own(benchmark):\n    import os\n"
        one += "    benchmark.extra_info['process'] = os.getpid()\n"
        one += "    benchmark.pedantic(lambda: None, rounds=1)\n"
        (tmp_path / name).write_text(one if name != "test_none.py" else "")
    (tmp_path / "test_broken.py").write_text("def test_broken():\n    assert 1 == 2\n")
    out = tmp_path / "new" / "record.json"
    names = ("test_first.py", "test_none.py", "test_second.py")
    command = [sys.executable, "-m", "benchmarks.suite", "--json", out, "--command", "make it"]

    def suite(*files: str) -> int:
        done = subprocess.run(
            [*map(str, command), *(str(tmp_path / file) for file in files)],
            capture_output=True, text=True, cwd=REPOSITORY, check=False,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        return done.returncode

    assert suite(*names) == 0
    record = json.loads(out.read_text())
    assert record["command"] == "make it"
    assert record["machine"]["device"]
    assert record["failed"] == []
    assert [result["name"] for result in record["results"]] == [
        "test_first.py::test_own", "test_second.py::test_own",
    ]  # fmt: skip
    assert len({result["process"] for result in record["results"]}) == 2

    assert suite("test_broken.py", *names) == 1
    record = json.loads(out.read_text())
    assert record["failed"] == ["test_broken.py::test_broken"]
    assert len(record["results"]) == 2

    kept = out.read_bytes()
    assert suite("test_first.py", "test_absent.py") != 0
    assert out.read_bytes() == kept


def test_records_of_two_commits_are_not_joined() -> None:
    def record(commit: str, *, dirty: bool = False) -> dict[str, object]:
        return {
            "schema": 1, "command": "pytest", "seconds": 1.5,
            "commit": {"id": commit, "dirty": dirty},
            "results": [{"name": commit}], "skipped": [], "failed": [],
        }  # fmt: skip

    both = joined([record("a"), record("a", dirty=True)], "make it")
    assert both["seconds"] == 3
    assert both["commit"] == {"id": "a", "dirty": True}
    assert len(both["results"]) == 2
    with pytest.raises(ValueError, match="commits a and b"):
        joined([record("a"), record("b")], "make it")
    with pytest.raises(ValueError, match="got none"):
        joined([], "make it")
