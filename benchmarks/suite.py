"""``make bench``: every file of benchmarks in a process of its own, one record of them all.

A process keeps what its allocator has been through: in one that had run other benchmarks, one of
the two steps of a pair found its largest tensors in the heap while the other had fresh pages zeroed
for it at every step, and a ratio of 1.00 was measured as 1.15.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.record import joined

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOTHING_COLLECTED = 5  # pytest's exit code where -k leaves none of a file


def run(files: Sequence[Path], out: Path, command: str, options: Sequence[str] = ()) -> int:
    """Run the files one after the other, write their record, and return the worst exit code."""
    worst, records = 0, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            part = Path(folder, f"{len(records)}.json")
            pytest = [sys.executable, "-m", "pytest", "-q", str(file), "--paired-json", str(part)]
            code = subprocess.run([*pytest, *options], check=False).returncode
            if code != _NOTHING_COLLECTED:
                worst = max(worst, abs(code))
            if not part.exists():
                sys.exit(
                    f"{file}: pytest ended with {code} and left no record, for the reason that it "
                    f"gives above; mend that and run again ({out} is as it was)"
                )
            records.append(json.loads(part.read_text()))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(joined(records, command), indent=1) + "\n")
    return worst


def main() -> None:
    """Run all files of this folder, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="The record.")
    parser.add_argument(
        "--command", default="python -m benchmarks.suite", metavar="TEXT",
        help="The command that the record names (default: %(default)s).",
    )  # fmt: skip
    parser.add_argument("-k", metavar="EXPRESSION", help="Which of their benchmarks, as of pytest.")
    parser.add_argument("files", nargs="*", type=Path, help="Default: test_*.py of this folder.")
    given = parser.parse_args()
    files = given.files or sorted(Path(__file__).parent.glob("test_*.py"))
    sys.exit(run(files, given.json, given.command, ["-k", given.k] if given.k else []))


if __name__ == "__main__":
    main()
