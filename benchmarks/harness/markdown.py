"""Cells, grids and captions in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NOTHING = "-"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(result: Mapping[str, Any] | None, *keys: str, unit: str = "") -> str:
    """Return a figure of a result, by a path of keys; ``-`` where it is not there."""
    value: Any = result
    for key in keys:
        if value is None or key not in value:
            return NOTHING
        value = value[key]
    return f"{_number(value)}{unit}"


def span(result: Mapping[str, Any] | None) -> str:
    """Return a ratio and its interval."""
    if result is None or "low" not in result:
        return NOTHING
    return _span(result["ratio"], result["low"], result["high"])


def inverse(result: Mapping[str, Any] | None) -> str:
    """Return how many times as long the reference takes, and the interval."""
    if result is None or "low" not in result:
        return NOTHING
    return _span(1 / result["ratio"], 1 / result["high"], 1 / result["low"])


def _span(ratio: float, low: float, high: float) -> str:
    return f"{_number(ratio)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    if abs(value) >= 10:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
    return f"{value:.2f}"


def caption(run: Mapping[str, Any]) -> str:
    """Return on what and how a run was measured, one paragraph."""
    machine, versions, commit = run["machine"], run["versions"], run["commit"]
    shown = ", ".join(
        f"{label} {versions[name]}"
        for label, name in (("Python", "python"), ("torch", "torch"), ("NumPy", "numpy"),
                            ("Numba", "numba"))
        if versions.get(name)
    )  # fmt: skip
    changed = " with local changes" if commit["dirty"] else ""
    if "amended" in run:
        changed += f" ({len(run['amended']['names'])} results measured apart, later)"
    return (
        f"*{machine['device']}, {machine['threads']} threads; {shown}; commit "
        f"{commit['id'] or 'unknown'}{changed}; {run['started_at'][:10]}, load "
        f"{machine['load']} at the start; `{run['command']}`. Ratios are medians of interleaved "
        "pairs with 95% intervals.*"
    )
