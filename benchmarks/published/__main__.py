"""``python -m benchmarks.published``: trains what runs.toml lists, and keeps the summaries.

A run that was broken off goes on where it was, and a finished one is left alone, so the command
can be given again until all is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinet_fast._atomic import replacing

RUNS = Path(__file__).with_name("runs.toml")
SUMMARIES = Path(__file__).parents[1] / "results" / "runs"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: Its name in runs.toml.
        seed: Its seed.
        options: Its other options, keys of config.json.
    """

    name: str
    seed: int
    options: dict[str, Any]

    def folder(self, out: Path) -> Path:
        """Return its run folder."""
        return out / self.name / f"seed-{self.seed}"

    def summary(self, summaries: Path) -> Path:
        """Return the file that keeps its metrics."""
        return summaries / self.name / f"seed-{self.seed}.json"

    def command(self, data: Path, out: Path, threads: int) -> list[str]:
        """Return the command that starts it, or goes on with it."""
        folder = self.folder(out)
        train = ["pinet-fast", "train", "--out", str(folder)]
        if (folder / "checkpoint.pt").exists():
            return [*train, "--resume"]
        options = self.options | {"data": str(data / self.options["data"]), "seed": self.seed}
        options["threads"] = threads
        if "attributes" in options:
            options["attributes"] = str(data / options["attributes"])
        return [*train, *(part for item in options.items() for part in _setting(*item))]


def _setting(key: str, value: Any) -> tuple[str, str]:
    if key == "data":  # the one option that --set does not stand for
        return "--data", value
    return "--set", f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def listed(path: Path | None = None) -> list[Run]:
    """Return the runs of a file, of runs.toml by default, in its order."""
    found = []
    for name, table in tomllib.loads((path or RUNS).read_text(encoding="utf-8")).items():
        options = {key: value for key, value in table.items() if key != "seeds"}
        found += [Run(name, seed, options) for seed in table["seeds"]]
    return found


def chosen(runs: list[Run], names: list[str]) -> list[Run]:
    """Return the runs of those names, and where no run is called that, those that begin so."""
    known = {run.name for run in runs}
    return [
        run for run in runs
        if not names
        or run.name in names
        or any(run.name.startswith(name) for name in names if name not in known)
    ]  # fmt: skip


def keep_summary(run: Run, out: Path, summaries: Path) -> None:
    """Copy a finished run's metrics, without the place of its log."""
    metrics = json.loads((run.folder(out) / "metrics.json").read_text(encoding="utf-8"))
    metrics["name"] = f"{run.name}/seed-{run.seed}"
    for key in ("data", "attributes"):
        metrics["config"][key] = Path(metrics["config"][key]).name
    target = run.summary(summaries)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        file.write(json.dumps(metrics, separators=(",", ":")).encode() + b"\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 where a run failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.published", description=__doc__)
    parser.add_argument("names", nargs="*", help="names, or beginnings of names; none = all")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of logs")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--summaries", type=Path, default=SUMMARIES, help="folder of summaries")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = as torch decides")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    given = parser.parse_args(arguments)
    wanted = chosen(listed(), given.names)
    if not wanted:
        parser.error(f"no run is called {' or '.join(given.names)}; --list prints all")
    failed = False
    for run in wanted:
        command = run.command(given.data, given.out, given.threads)
        if given.list:
            print(" ".join(command))
            continue
        if not (run.folder(given.out) / "metrics.json").exists():
            print(f"{run.name} seed {run.seed}", flush=True)
            script = Path(sys.executable).with_name(command[0])
            if subprocess.run([script, *command[1:]]).returncode:
                failed = True
                continue
        keep_summary(run, given.out, given.summaries)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
