"""The plots of a report: quality by stratum and by activeness, and what happened over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from pinet_fast.report import _svg, step_plots
from pinet_fast.report._lines import Plot
from pinet_fast.report.bootstrap import mean_interval, paired_differences
from pinet_fast.report.compare import paired_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from pinet_fast.report.run_files import RunFiles
    from pinet_fast.report.schema import IntArray, Interval

_ACTIVENESS_BINS = 10


@dataclass(frozen=True)
class Plots:
    """The plots of a report.

    Attributes:
        by_stratum: NDCG@10 by stratum.
        of_strata: The training of each stratum.
        others: What sets the strata side by side, and throughput.
        against: Differences to a baseline by activeness; None without one on the same users.
    """

    by_stratum: Plot
    of_strata: tuple[Plot, ...]
    others: tuple[Plot, ...]
    against: Plot | None = None


def all_plots(run: RunFiles, baseline: RunFiles | None = None) -> Plots:
    """Draw what the run logged, and its differences to a baseline on the same users."""
    steps = [step for step in run.steps if step.stage == "backbone"]
    with _svg.drawing():
        others = [_by_activeness(run)]
        if any(step.norms is not None for step in steps):
            others.append(step_plots.gradients(run, steps))
        if any(step.weights is not None for step in steps):
            others.append(step_plots.weights(run, steps))
        if run.steps:
            others.append(step_plots.throughput(run))
        return Plots(
            by_stratum=_by_stratum(run),
            of_strata=tuple(step_plots.stratum_training(run, s) for s in range(run.num_strata)),
            others=tuple(others),
            against=None if baseline is None else _against(run, baseline),
        )


def _by_stratum(run: RunFiles) -> Plot:
    fig, (ax,) = _svg.figure()
    names = run.group_names
    width = 0.12 if len(run.test) > 1 else 0.0
    for stage, side in zip(run.test, (-width, width), strict=False):
        values = [group.metrics["ndcg@10"] for group in run.test[stage].groups]
        _intervals(ax, np.arange(len(names)) + side, values, stage)
    ax.set_xticks(range(len(names)), names)
    if len(names) > 4:
        ax.tick_params(axis="x", rotation=30)
    ax.set_xlim(-0.5, len(names) - 0.5)
    _svg.from_zero(ax)
    ax.grid(visible=False, axis="x")
    ax.axvline(0.5, color=_svg.GRID, linewidth=0.8)
    ax.set_ylabel("test NDCG@10")
    _svg.legend(fig, ax)
    caption = (
        "NDCG@10 (0 to 1, higher is better) on the test events of all users and of each stratum, "
        "from least to most active; bars are 95% bootstrap intervals over users."
    )
    title = "NDCG@10 by stratum"
    return Plot("by-stratum", title, _svg.to_svg(fig, "by-stratum", title), caption)


def _by_activeness(run: RunFiles) -> Plot:
    fig, (ax,) = _svg.figure()
    bins = _activeness_bins(run.ranks.activeness)
    for stage, factor in zip(run.ranks.by_stage, (0.985, 1.015), strict=False):
        ranks = run.ranks.by_stage[stage]
        x = np.array([np.median(run.ranks.activeness[mask]) for mask in bins])
        # On a logarithmic axis nobody can stand at 0 events.
        x = np.maximum(x, 0.5) * (factor if len(run.ranks.by_stage) > 1 else 1.0)
        _intervals(ax, x, [mean_interval(ranks[mask]) for mask in bins], stage, linewidth=0.9)
    if bins:
        _log_axis(ax)
        _strata_borders(ax, run)
        _svg.from_zero(ax)
    else:
        _svg.empty(ax, "no test users")
    ax.set_xlabel("activeness (training events of a user)")
    ax.set_ylabel("test NDCG@10")
    _svg.legend(fig, ax)
    caption = (
        f"NDCG@10 on the test events of users binned by activeness ({len(bins)} quantile bins, "
        "drawn at their median number of training events), with 95% bootstrap intervals over "
        "users; dotted lines are the borders of the strata."
    )
    title = "NDCG@10 by activeness"
    return Plot("by-activeness", title, _svg.to_svg(fig, "by-activeness", title), caption)


def _against(run: RunFiles, baseline: RunFiles) -> Plot | None:
    pairs = paired_ranks(baseline, run)
    if pairs is None or not len(pairs.order):
        return None
    fig, (ax,) = _svg.figure()
    activeness = baseline.ranks.activeness[pairs.order]
    bins = _activeness_bins(activeness)
    values = [paired_differences(pairs.first[mask], pairs.second[mask])["ndcg@10"] for mask in bins]
    x = np.maximum([np.median(activeness[mask]) for mask in bins], 0.5)
    _intervals(ax, x, values, run.final, linewidth=0.9)
    _log_axis(ax)
    _strata_borders(ax, run)
    ax.axhline(0, color=_svg.INK, linewidth=0.9)
    ax.set_xlabel("activeness (training events of a user)")
    ax.set_ylabel("difference in NDCG@10")
    caption = (
        f"Test NDCG@10 of this run minus that of the baseline, user by user, in {len(bins)} "
        "quantile bins of activeness (drawn at their median number of training events), with 95% "
        "bootstrap intervals over users; above 0 this run is better. Dotted lines are the borders "
        "of the strata."
    )
    title = "Difference by activeness"
    return Plot("against", title, _svg.to_svg(fig, "against", title), caption)


def _strata_borders(ax: Axes, run: RunFiles) -> None:
    for facts in run.strata[1:]:
        if facts.min_activeness:
            ax.axvline(facts.min_activeness, color=_svg.MUTED, linestyle=":", linewidth=1)


def _log_axis(ax: Axes) -> None:
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    marks = [m * 10.0**e for e in range(8) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ax.set_xticks(marks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _activeness_bins(activeness: IntArray) -> list[npt.NDArray[np.bool_]]:
    """Return masks of about equally many users; users of equal activeness are never parted."""
    if not len(activeness):
        return []
    borders = np.unique(np.quantile(activeness, np.linspace(0, 1, _ACTIVENESS_BINS + 1)[1:-1]))
    ids = np.searchsorted(borders, activeness, side="left")
    return [ids == b for b in np.unique(ids)]


def _intervals(
    ax: Axes,
    x: npt.NDArray[np.floating[Any]],
    values: Sequence[Interval],
    stage: str,
    linewidth: float = 0.0,
) -> None:
    known = [
        (at, v.mean, v.mean - v.low, v.high - v.mean)
        for at, v in zip(x, values, strict=True)
        if v.mean is not None and v.low is not None and v.high is not None
    ]
    if not known:
        return
    at, mean, down, up = np.array(known).T
    ax.errorbar(
        at,
        mean,
        yerr=[np.maximum(down, 0), np.maximum(up, 0)],
        color=_svg.STAGE_COLOURS[stage],
        marker=_svg.STAGE_MARKERS[stage],
        linestyle="-" if linewidth else "none",
        linewidth=linewidth,
        elinewidth=1.4,
        capsize=2.5,
        label=_svg.STAGE_LABELS[stage],
    )
