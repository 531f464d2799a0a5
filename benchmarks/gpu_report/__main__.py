"""``python -m benchmarks.gpu_report --out FILE.json``: check and time every kernel on a GPU.

From the root of a checkout, with torch >= 2.11 and Triton >= 3.6 and nothing else. It keeps to
``--budget`` seconds by leaving out what it has no time for, records what fails and goes on, and
writes the file after every section. Exit codes: 0 all as it should be, 1 something is not, 2 there
is no GPU or the arguments make no sense.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report import ops, table, whole_step
from benchmarks.gpu_report.setting import Setting

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]

# Shares of the budget after which a section begins no further case.
SECTIONS: tuple[tuple[str, float, Any], ...] = (
    ("limits", 0.1, ops.limits),
    ("backends", 0.1, ops.backends),
    ("steps correct", 0.3, whole_step.correctness),
    ("ops correct", 0.6, lambda setting, row: ops.over_cases(setting, ops.check, row)),
    ("steps timed", 0.75, whole_step.timings),
    ("ops timed", 0.95, lambda setting, row: ops.over_cases(setting, ops.time_op, row)),
)


def main(arguments: list[str] | None = None) -> int:
    """Run, or render a table; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--table", type=Path, help="render the tables of this JSON, and run nothing"
    )
    parser.add_argument("--budget", type=float, default=450.0, help="seconds (default 450)")
    parser.add_argument(
        "--cpu", action="store_true", help="tiny inputs on the CPU, to test this report itself"
    )
    given = parser.parse_args(arguments)
    if given.table:
        print(table.render(json.loads(given.table.read_text())), end="")
        return 0
    if not given.out:
        print("gpu_report: --out FILE.json is needed, or --table FILE.json", file=sys.stderr)
        return 2
    if not given.cpu and not torch.cuda.is_available():
        print("gpu_report: no CUDA device", file=sys.stderr)
        return 2
    report = run(given.out, "cpu" if given.cpu else "cuda", given.budget)
    print(table.render(report), end="")
    return 0 if _is_fine(report) else 1


def run(out: Path, device: str, budget: float) -> Row:
    """Run every section and write the JSON after each."""
    started = time.monotonic()
    is_cpu = device == "cpu"
    if is_cpu:
        torch.set_num_threads(1)  # waking others takes longer than anything here
    where = torch.device(device) if is_cpu else torch.device("cuda", torch.cuda.current_device())
    backend = "reference" if is_cpu else "triton"
    report: Row = {"schema": 1, **_circumstances(where), "backend": backend, "is_tiny": is_cpu}
    report["sections"] = {}
    for name, share, section in SECTIONS:
        setting = Setting(where, backend, is_cpu, started + share * budget)
        print(f"{time.monotonic() - started:6.1f} s  {name}", file=sys.stderr, flush=True)
        report["sections"][name] = _guarded(section, setting)
        report["seconds"] = time.monotonic() - started
        out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _guarded(section: Any, setting: Setting) -> Row:
    """Run a section; what it found stays when it fails."""
    rows: list[Row] = []
    begun = time.monotonic()
    found: Row = {"status": "ok", "rows": rows}
    if not setting.has_time():
        return {**found, "status": "left out: no time"}
    try:
        section(setting, rows.append)
    except Exception as error:
        found["status"] = f"failed: {type(error).__name__}: {error}"[:500]
        found["traceback"] = traceback.format_exc()[-4000:]
    return {**found, "seconds": time.monotonic() - begun}


def _circumstances(device: torch.device) -> Row:
    """Return device, versions, commit and date."""
    named: Row = {"name": platform.processor() or platform.machine(), "type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        named = {
            "name": properties.name, "type": "cuda", "sm": f"{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }  # fmt: skip
    return {
        "device": named,
        "versions": {
            "torch": torch.__version__, "triton": _version("triton"),
            "cuda": torch.version.cuda, "python": platform.python_version(),
        },
        "commit": _git("rev-parse", "HEAD"),
        "is_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None where there is no repository or no git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _is_fine(report: Row) -> bool:
    sections = report["sections"].values()
    rows = [row for section in sections for row in section["rows"]]
    return all(x.get("status", "ok") == "ok" for x in (*sections, *rows))


if __name__ == "__main__":
    sys.exit(main())
