"""One JSON file a run: every benchmark's figures, who skipped and why, and on what it ran."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness import machine

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

SCHEMA = 1


def name_of(node_id: str) -> str:
    """Return a benchmark's name, the same from the repository's root and from benchmarks/."""
    return node_id.removeprefix("benchmarks/")


class Recorder:
    """A pytest plugin that writes a run's record when the session ends.

    Args:
        path: The file; None writes none.
        command: The command line, as shown under the tables.
    """

    def __init__(self, path: Path | None, command: str) -> None:
        self.path = path
        self.command = command
        self.started = time.time()
        self.machine = machine.describe() if path else {}
        self.commit = machine.commit() if path else {}
        self.results: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.failed: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Take over what a benchmark left in ``extra_info``."""
        report = yield
        name = name_of(item.nodeid)
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped.append({"name": name, "reason": str(reason).removeprefix("Skipped: ")})
        elif report.failed:
            self.failed.append(name)
        elif report.when == "call":
            benchmark = getattr(item, "funcargs", {}).get("benchmark")
            if benchmark is not None:
                self.results.append(
                    {"name": name, "group": benchmark.group, "params": _params(item)}
                    | _plain(benchmark.extra_info)
                )
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "started_at": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 1),
            "commit": self.commit,
            "machine": self.machine,
            "versions": machine.versions(),
            "results": self.results,
            "skipped": self.skipped,
            "failed": self.failed,
        }


def joined(records: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """Return one record of runs that followed each other, on one machine and commit.

    Raises:
        ValueError: There are none, or the commit changed between them.
    """
    if not records:
        raise ValueError("joined: expected the record of one run at least, got none")
    first = records[0]
    for record in records:
        if record["commit"]["id"] != first["commit"]["id"]:
            raise ValueError(
                f"joined: the runs are of commits {first['commit']['id']} and "
                f"{record['commit']['id']}; run them again on one of them"
            )
    return (
        first
        | {
            "command": command,
            "seconds": round(sum(record["seconds"] for record in records), 1),
            "commit": first["commit"] | {"dirty": any(r["commit"]["dirty"] for r in records)},
        }
        | {
            key: [each for record in records for each in record[key]]
            for key in ("results", "skipped", "failed")
        }
    )


def _params(item: pytest.Item) -> dict[str, Any]:
    given = getattr(getattr(item, "callspec", None), "params", {})
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    """Return what JSON holds of a value; floats keep six digits, which no timing exceeds."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return getattr(value, "__name__", str(value))
