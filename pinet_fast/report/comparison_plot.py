"""Plots runs side by side: a metric by stratum, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pinet_fast.errors import ConfigError
from pinet_fast.report.activeness_plot import checked_suffix

if TYPE_CHECKING:
    from pathlib import Path

    from pinet_fast.report.compare import Comparison

# Told apart by colour-blind readers too; runs beyond these repeat them with another marker.
_COLOURS = ("#50607a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_MARKERS = ("o", "s", "D", "^")


def plot_comparison(path: Path, comparison: Comparison, metric: str = "ndcg@10") -> None:
    """Write one point a run and group, with its 95% interval.

    Args:
        path: A ``.png`` or ``.svg`` file.
        comparison: The runs.
        metric: Which metric.

    Raises:
        ConfigError: Another suffix, or a file that cannot be written.
    """
    from matplotlib.figure import Figure

    checked_suffix(path)
    groups, runs = len(comparison.groups), len(comparison.runs)
    figure = Figure(figsize=(2 + 1.6 * groups + 0.25 * runs * groups, 4), layout="constrained")
    axes = figure.subplots()
    for r, label in enumerate(comparison.labels):
        cells = [comparison.cells[metric][g][r].value for g in range(groups)]
        known = [g for g in range(groups) if cells[g].mean is not None]
        shift = (r - (runs - 1) / 2) * 0.7 / runs
        means = np.array([cells[g].mean for g in known], dtype=float)
        low = np.array([cells[g].low for g in known], dtype=float)
        high = np.array([cells[g].high for g in known], dtype=float)
        axes.errorbar(
            np.array(known) + shift, means, yerr=np.stack([means - low, high - means]).clip(0),
            fmt=_MARKERS[r // len(_COLOURS) % len(_MARKERS)], color=_COLOURS[r % len(_COLOURS)],
            capsize=3, label=label,
        )  # fmt: skip
    names = [f"{n}\n{u:,} users" for n, u in zip(comparison.groups, comparison.users, strict=True)]
    axes.set_xticks(range(groups), names)
    axes.set(ylabel=f"test {metric.upper()}", xlim=(-0.5, groups - 0.5))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", linewidth=0.5)
    simulated = " - SIMULATED DATA" if comparison.simulated else ""
    axes.set_title(f"{comparison.runs[0].data.name}{simulated}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=min(runs, 3), frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot write there ({error.strerror})") from None
