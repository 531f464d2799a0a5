"""Prints the grid as Markdown: ``PYTHONPATH=tests python -m grid.table`` from the root.

Every cell runs in every dtype; it ends with status 1 where one failed.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch

from grid.layers import LAYERS
from grid.run import TOLERANCE, Outcome, outcome
from grid.situations import NOT_APPLICABLE, SITUATIONS

MARK = {"exact": "=", "refused": "E", "n/a": "", "FAILED": "**x**"}
DTYPES = (*TOLERANCE, torch.bfloat16)


def outcomes(dtype: torch.dtype = torch.float64) -> dict[tuple[str, str], Outcome]:
    """Run what has not run yet; return every cell's outcome by (situation, layer)."""
    return {(s, layer): outcome(layer, s, dtype) for s in SITUATIONS for layer in LAYERS}


def tally(dtype: torch.dtype = torch.float64) -> Counter[str]:
    """Count cells by what they did."""
    return Counter(cell.kind for cell in outcomes(dtype).values())


def counts_of(dtype: torch.dtype) -> str:
    """Return one line: what the cells did in one dtype."""
    counts = tally(dtype)
    counted = counts["exact"] + counts["refused"] + counts["FAILED"]
    return (
        f"{str(dtype).removeprefix('torch.')}: exact (`=`) {counts['exact']} of {counted}, refused "
        f"by name (`E`) {counts['refused']}, failed (`x`) {counts['FAILED']}"
    )


def markdown(dtypes: tuple[torch.dtype, ...] = DTYPES[:1]) -> str:
    """Return the table in float64, the counts of all dtypes, and notes on what is not exact."""
    cells = outcomes()
    lines = ["| | " + " | ".join(LAYERS) + " |", "|---" * (len(LAYERS) + 1) + "|"]
    for situation in SITUATIONS:
        marks = (MARK[cells[situation, layer].kind] for layer in LAYERS)
        lines.append(f"| {situation} | " + " | ".join(marks) + " |")
    lines += ["", *(f"- {counts_of(dtype)}" for dtype in dtypes)]
    lines.append(f"- empty: makes no sense, not counted: {tally()['n/a']}, listed below")
    bounds = ", ".join(f"{name} {layer.bf16:g}" for name, layer in LAYERS.items())
    lines.append(
        f"- tolerances, relative to the largest entry: float64 {TOLERANCE[torch.float64]:g}, "
        f"float32 {TOLERANCE[torch.float32]:g}; bf16, and bf16 autocast: {bounds}"
    )
    refused = sorted({(s, c.detail) for (s, _), c in cells.items() if c.kind == "refused"})
    lines += [f"- {situation}: `{error}`" for situation, error in refused]
    empty: dict[tuple[str, str], list[str]] = {}
    for (situation, layer), reason in NOT_APPLICABLE.items():
        empty.setdefault((situation, reason), []).append(layer)
    lines += [f"- {s}, {', '.join(names)}: {reason}" for (s, reason), names in empty.items()]
    lines += [
        f"- FAILED in {dtype}: {situation}, {layer}: {c.detail}"
        for dtype in dtypes
        for (situation, layer), c in outcomes(dtype).items()
        if c.kind == "FAILED"
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(DTYPES))
    sys.exit(any(tally(dtype)["FAILED"] for dtype in DTYPES))
