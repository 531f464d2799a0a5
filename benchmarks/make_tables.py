"""``make tables``: write README's marked tables, and the table of every result, from results."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness.tables import CPU, RESULTS, everything, read, regenerate

README = Path(__file__).resolve().parents[1] / "README.md"


def main() -> int:
    """Write both; return an exit code."""
    try:
        (RESULTS / CPU).with_suffix(".md").write_text(everything(read()))
        README.write_text(regenerate(README.read_text()))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
