"""Figures as inline SVG: one look, light and dark, the same bytes for the same run."""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

# Placeholders: rendered colours that become CSS variables, so that the page decides on them.
INK, MUTED, GRID = "#10203a", "#50607a", "#d0d8e2"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}

STAGE_COLOURS = {"backbone": "#7f8ea3", "heads": "#9b5de5"}
STAGE_MARKERS = {"backbone": "o", "heads": "D"}
STAGE_LABELS = {"backbone": "backbone", "heads": "with plugin heads"}

_STRATUM_ANCHORS = ("#e2703a", "#c9a227", "#3f9f6b", "#3a86c8")  # from tail to head
_DASHES = ("-", "--", "-.", ":")
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))

_STYLE: Any = {  # Any: the type of the keys is not the same in all versions of matplotlib
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of strata are text, whatever dollars they hold
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Enter the report's style, starting from matplotlib's own defaults, not the user's."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def figure(rows: int = 1, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """Return a figure of the page's width and its axes, one below the other with one x axis."""
    fig = Figure(figsize=(5.0, height), layout="constrained")
    axes = fig.subplots(rows, 1, sharex=True, squeeze=False)
    return fig, list(axes[:, 0])


def stratum_styles(num_strata: int) -> list[dict[str, str]]:
    """Return the colour and dashes of the strata's lines, ordered from tail to head."""
    colours = mpl.colors.LinearSegmentedColormap.from_list("strata", _STRATUM_ANCHORS)
    return [
        {
            "color": mpl.colors.to_hex(colours(s / max(num_strata - 1, 1))),
            "linestyle": _DASHES[s % len(_DASHES)],
        }
        for s in range(num_strata)
    ]


def step_axis(ax: Axes) -> None:
    """Label an x axis of optimizer steps."""
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def from_zero(ax: Axes) -> None:
    """Let a y axis of drawn quantities begin at 0 (or at the least, below it), with some air."""
    low, high = ax.dataLim.intervaly
    if np.isfinite([low, high]).all():
        ax.set_ylim(min(0.0, low * 1.08), max(high * 1.08, 1e-9))


def legend(fig: Figure, ax: Axes, columns: int = 3, side: str = "upper") -> None:
    """Put an axes' legend above or below the figure, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        place: Any = f"outside {side} left"
        fig.legend(handles, labels, loc=place, ncols=columns, handlelength=2.2)


def empty(ax: Axes, text: str) -> None:
    """Say in an axes why it shows nothing."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=MUTED)
    ax.set_yticks([])


def to_svg(fig: Figure, key: str, description: str) -> str:
    """Render a figure as an ``<svg>`` element for a page that holds several.

    Args:
        fig: The figure, made inside :func:`drawing`.
        key: Distinct within the page; prefixes every id.
        description: Read out by screen readers.
    """
    buffer = io.StringIO()
    # Ids are hashed from the content and this salt; without one they differ from run to run.
    with mpl.rc_context({"svg.hashsalt": key}):
        fig.savefig(buffer, format="svg", metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # Inside HTML an <svg> needs no namespaces, and its size is the page's affair.
    head, body = svg.split(">", 1)
    viewbox = re.search(r'viewBox="[^"]*"', head)
    assert viewbox is not None
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg {viewbox[0]} role="img" aria-label="{label}">{body}'.strip()
