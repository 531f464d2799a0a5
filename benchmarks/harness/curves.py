"""Plots of scaling curves, the same bytes for the same figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the power p of y = c x^p that fits best in logarithms; None for one point."""
    if len(x) < 2:
        return None
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write cost and memory of every curve as one SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "pinet_fast"
    figure = Figure(figsize=(3 * len(curves), 6), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for k, (name, points) in enumerate(curves.items()):
        is_number = all(isinstance(p["x"], (int, float)) for p in points)
        x = [p["x"] if is_number else str(p["x"]) for p in points]
        ratios = np.array([[p["ratio"], p["low"], p["high"]] for p in points])
        spread = np.abs(ratios[:, 1:].T - ratios[:, 0])
        cost, memory = axes[0][k], axes[1][k]
        style = {"marker": "o", "linestyle": "-" if is_number else ""}
        cost.errorbar(x, ratios[:, 0], spread, capsize=2, **style)
        memory.plot(x, [p["memory_ratio"] for p in points], color="tab:orange", **style)
        for axis, what in ((cost, "time"), (memory, "peak tensor memory")):
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.set_ylim(bottom=0)
            axis.set_xlabel(name)
            if is_number:
                axis.set_xscale("log", base=10 if name == "V" else 2)
            else:
                axis.tick_params(axis="x", rotation=90)
            if k == 0:
                axis.set_ylabel(f"{what} over a plain step")
    figure.savefig(path, metadata={"Date": None})
