"""Lines over optimizer steps, thinned and smoothed so that a page of them stays readable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FloatArray = npt.NDArray[np.float64]

_MAX_POINTS = 400  # of a line: more cannot be told apart, and would bloat the page


@dataclass(frozen=True)
class Plot:
    """A plot of the report, with a sentence on what it shows and in what unit."""

    key: str
    title: str
    svg: str
    caption: str


def draw_line(
    ax: Axes,
    steps: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    color: str,
    linestyle: str = "-",
    label: str = "",
) -> bool:
    """Draw values over steps: faint as logged, bold their running mean.

    Args:
        ax: Where to draw.
        steps: Steps of the values.
        values: The values, NaN where there is none.
        color: Colour of the line.
        linestyle: Its dashes.
        label: Its name in the legend.

    Returns:
        Whether there was anything to draw.
    """
    x, y = thinned(steps, values)
    if not len(x):
        return False
    smooth = running_mean(y)
    if smooth is not None:
        ax.plot(x, y, color=color, alpha=0.3, linewidth=1.0)
    marker = "o" if len(x) < 3 else None
    bold = y if smooth is None else smooth
    ax.plot(x, bold, color=color, linestyle=linestyle, marker=marker, label=label)
    return True


def thinned(steps: npt.ArrayLike, values: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Drop unknown values, and average neighbours until few enough points are left."""
    x, y = np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= _MAX_POINTS:
        return x, y
    cuts = np.linspace(0, len(x), _MAX_POINTS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(cuts, len(x)))
    return np.add.reduceat(x, cuts) / sizes, np.add.reduceat(y, cuts) / sizes


def running_mean(values: FloatArray) -> FloatArray | None:
    """Return the centred mean over about a fifteenth of the line; None for short lines."""
    half = len(values) // 30
    if half < 1:
        return None
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))
