"""The GPU report on tiny inputs with the reference backend: no figure of it means anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Where the report has to run there is torch, Triton and NumPy, and nothing else of ours.
ABSENT = ("nvtx", "numba", "pyarrow", "duckdb", "typer", "rich", "matplotlib", "jinja2", "torchjd")
RUN = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {root!r})
sys.argv = ["gpu_report", *{arguments!r}]
runpy.run_module("benchmarks.gpu_report", run_name="__main__")
"""


def run_report(root, *arguments, **env):
    """Run the report from a checkout; return the finished process."""
    code = RUN.format(absent=ABSENT, root=str(root), arguments=[str(x) for x in arguments])
    return subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}\n{code}"],
        cwd=root, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", **env},
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return the sources alone, with no compiled library and no repository."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pinet_fast", "kernels", "benchmarks"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    return folder


@pytest.fixture(scope="module")
def finished(checkout, tmp_path_factory):
    """Return the process and the JSON of a whole report."""
    out = tmp_path_factory.mktemp("report") / "report.json"
    done = run_report(checkout, "--cpu", "--out", out)
    assert out.exists(), done.stderr[-3000:]
    return done, json.loads(out.read_text()), out


@pytest.mark.slow
def test_every_section_runs_in_a_bare_checkout(finished):
    done, report, _ = finished
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name: s["status"] for name, s in report["sections"].items()} == dict.fromkeys(
        ("limits", "backends", "steps correct", "ops correct", "steps timed", "ops timed"), "ok"
    )
    assert all(row.get("status", "ok") == "ok" for s in report["sections"].values()
               for row in s["rows"])  # fmt: skip


@pytest.mark.slow
def test_report_says_where_it_ran(finished):
    _, report, _ = finished
    assert report["versions"]["torch"] == torch.__version__
    assert report["is_tiny"] is True
    assert report["commit"] is None  # no repository there
    assert report["device"]["type"] == "cpu"


@pytest.mark.slow
def test_every_public_op_is_checked_and_timed(finished):
    from pinet_fast import kernels

    public = {name for name in kernels.__all__ if name.startswith(("strat", "routed"))}
    for section in ("backends", "ops correct", "ops timed"):
        assert {row["op"] for row in finished[1]["sections"][section]["rows"]} == public
    for row in finished[1]["sections"]["ops correct"]["rows"]:
        assert row["equal"] == row["repeats"] == 3
        assert row["left_unwritten"] == 0
    for row in finished[1]["sections"]["steps correct"]["rows"]:
        assert min(row["calls"].values()) >= 1


@pytest.mark.slow
def test_table_is_made_from_the_json_alone(finished, checkout):
    _, report, path = finished
    done = run_report(checkout, "--table", path)
    assert done.returncode == 0
    assert done.stdout == finished[0].stdout
    assert "whose times mean nothing" in done.stdout
    assert "Not as it should be" not in done.stdout
    for row in report["sections"]["ops timed"]["rows"]:
        assert f"| `{row['op']}` | {row['case']} |" in done.stdout


def test_without_a_gpu_it_says_so_in_one_line(checkout, tmp_path):
    done = run_report(checkout, "--out", tmp_path / "x.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_report: no CUDA device\n"
    assert not (tmp_path / "x.json").exists()


def test_failures_are_recorded_and_rendered(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_report import __main__ as report_main
    from benchmarks.gpu_report import ops, table
    from benchmarks.gpu_report.cases import Case
    from benchmarks.gpu_report.setting import Setting

    setting = Setting(torch.device("cpu"), "reference", True, float("inf"))

    def fails(setting, row):
        row({"op": "stratum_sums", "case": "one", "status": "wrong"})
        raise ValueError("no such thing")

    section = report_main._guarded(fails, setting)
    assert section["status"] == "failed: ValueError: no such thing"
    assert "ValueError" in section["traceback"]

    def make(seed):
        return torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), 1

    cases = [
        Case("stratum_sums", "two", make, (1, 1), -1.0),
        Case("stratum_sums", "three", 0, 0, 0),
    ]
    monkeypatch.setattr(ops, "every_case", lambda setting: cases)
    rows = []
    ops.over_cases(setting, ops.check, rows.append)
    late = Setting(torch.device("cpu"), "reference", True, 0.0)
    ops.over_cases(late, ops.check, rows.append)
    assert [row["status"].partition(":")[0] for row in rows] == [
        "wrong", "failed", "left out", "left out",
    ]  # fmt: skip
    report = {
        "device": {"name": "a CPU"}, "versions": {"torch": "1", "triton": None, "python": "3"},
        "commit": None, "date": "2026-11-28", "backend": "reference", "seconds": 1.0,
        "is_tiny": True, "sections": {"limits": section, "ops correct": {"status": "ok",
                                                                        "rows": rows}},
    }  # fmt: skip
    assert not report_main._is_fine(report)
    amiss = table.render(report | {"sections": {"ops correct": {"status": "ok", "rows": rows},
                                                "other": section}})  # fmt: skip
    assert "- other: failed: ValueError: no such thing" in amiss
    assert "- ops correct: stratum_sums two: wrong" in amiss


def test_unwritten_elements_are_seen(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_report.setting import poisoned_outputs

    original = torch.empty
    with poisoned_outputs():
        x = torch.empty(3)
        assert x.isnan().all()
        assert x.new_empty(2).isnan().all()
        assert torch.empty_like(x).isnan().all()
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    assert torch.empty is original


def test_floor_is_the_larger_of_arithmetic_and_traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_report.table import floor_seconds

    limits = {"copy": 1e12, "products in bfloat16": 1e14, "products in float32 ieee": 1e13}
    assert floor_seconds({"case": "D=4 bfloat16", "flop": 1e14, "bytes": 1}, limits) == 1.0
    assert floor_seconds({"case": "D=4 float32", "flop": 1e13, "bytes": 3e12}, limits) == 3.0
    assert floor_seconds({"case": "float32 tf32", "flop": 1, "bytes": 1}, limits) is None
