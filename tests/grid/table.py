"""Prints the grid as Markdown: ``PYTHONPATH=tests python -m grid.table`` from the root."""

from __future__ import annotations

from collections import Counter

import torch

from grid.layers import LAYERS
from grid.run import Outcome, outcome
from grid.situations import NOT_APPLICABLE, SITUATIONS

MARK = {"exact": "=", "refused": "E", "n/a": "", "FAILED": "**x**"}


def outcomes() -> dict[tuple[str, str], Outcome]:
    """Run what has not run yet; return every cell's outcome by (situation, layer)."""
    return {(s, layer): outcome(layer, s, torch.float64) for s in SITUATIONS for layer in LAYERS}


def tally() -> Counter[str]:
    """Count cells by what they did."""
    return Counter(cell.kind for cell in outcomes().values())


def markdown() -> str:
    """Return the table, its counts, and a note for each kind of cell that is not exact."""
    cells = outcomes()
    lines = ["| | " + " | ".join(LAYERS) + " |", "|---" * (len(LAYERS) + 1) + "|"]
    for situation in SITUATIONS:
        marks = (MARK[cells[situation, layer].kind] for layer in LAYERS)
        lines.append(f"| {situation} | " + " | ".join(marks) + " |")
    counts = tally()
    counted = counts["exact"] + counts["refused"] + counts["FAILED"]
    lines += [
        "",
        f"`=` exact: {counts['exact']} of {counted}; `E` refused by name: {counts['refused']}; "
        f"`x` failed: {counts['FAILED']}; empty: makes no sense ({counts['n/a']}), not counted.",
        "",
    ]
    bounds = ", ".join(f"{name} {layer.bf16:g}" for name, layer in LAYERS.items())
    lines.append(f"- float64 within 1e-10; bf16 autocast, relative to the largest entry: {bounds}")
    refused = sorted({(s, c.detail) for (s, _), c in cells.items() if c.kind == "refused"})
    lines += [f"- {situation}: `{error}`" for situation, error in refused]
    empty: dict[tuple[str, str], list[str]] = {}
    for (situation, layer), reason in NOT_APPLICABLE.items():
        empty.setdefault((situation, reason), []).append(layer)
    lines += [f"- {s}, {', '.join(names)}: {reason}" for (s, reason), names in empty.items()]
    lines += [
        f"- FAILED {situation}, {layer}: {c.detail}"
        for (situation, layer), c in cells.items()
        if c.kind == "FAILED"
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
