"""Plots the long tails of a log: how active users are, and who has how much of the events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

SUFFIXES = (".png", ".svg")
_TAIL, _HEAD, _MUTED = "#0072b2", "#d55e00", "#8a8a8a"  # told apart by colour-blind readers too


def plot_activeness(
    path: Path,
    activeness: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    popularity: npt.NDArray[np.int64],
    edges: Sequence[int],
    title: str,
) -> None:
    """Write two panels: how many users are so active, and cumulative shares of events.

    Args:
        path: A ``.png`` or ``.svg`` file.
        activeness: Training events per user, which the strata are cut by.
        lengths: Events per user.
        popularity: Events per item.
        edges: Borders of the strata, drawn as lines.
        title: Written above.

    Raises:
        ConfigError: Another suffix, or a file that cannot be written.
    """
    from matplotlib.figure import Figure

    checked_suffix(path)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _survivors(left, activeness, edges)
    for counts, name, colour in ((lengths, "users", _TAIL), (popularity, "items", _HEAD)):
        ordered = np.sort(counts)[::-1]
        share = np.concatenate(([0.0], np.cumsum(ordered) / ordered.sum()))
        right.plot(np.linspace(0, 1, len(share)), share, color=colour, label=name)
    right.plot((0, 1), (0, 1), color=_MUTED, linewidth=0.8, linestyle=":", label="all equal")
    right.axvline(0.2, color=_MUTED, linewidth=0.8)
    right.set(xlabel="share of users or items, most active first", ylabel="share of events",
              xlim=(0, 1), ylim=(0, 1))  # fmt: skip
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot write there ({error.strerror})") from None


def checked_suffix(path: Path) -> None:
    """Check that a plot can be written in the format that a name asks for.

    Raises:
        ConfigError: It cannot.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: expected a name ending in .png or .svg")


def _survivors(axes: Any, activeness: npt.NDArray[np.int64], edges: Sequence[int]) -> None:
    values, counts = np.unique(activeness, return_counts=True)
    at_least = np.cumsum(counts[::-1])[::-1]
    axes.step(values, at_least, where="pre", color=_TAIL)
    axes.set(xscale="log", yscale="log", xlabel="training events",
             ylabel="users with at least so many")  # fmt: skip
    for edge in edges:
        axes.axvline(edge, color=_HEAD, linewidth=1)
    if edges:
        axes.plot([], [], color=_HEAD, linewidth=1, label="borders of strata")
        axes.legend(frameon=False)
