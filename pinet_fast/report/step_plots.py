"""Plots over optimizer steps: losses, stratum gradients, rule weights, throughput."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pinet_fast.report import _svg
from pinet_fast.report._lines import FloatArray, Plot, draw_line, thinned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from pinet_fast.report.run_files import RunFiles
    from pinet_fast.report.schema import IntArray, StepRecord

_MAX_PAIRS = 6  # cosine lines that can be told apart


def stratum_training(run: RunFiles, s: int) -> Plot:
    """Draw one stratum's training loss and validation NDCG@10."""
    style = _svg.stratum_styles(run.num_strata)[s]
    fig, (top, bottom) = _svg.figure(rows=2, height=3.7)
    has_own = any(step.stratum_losses is not None for step in run.steps)
    drawn = False
    for stage in run.stages:
        steps = [step for step in run.steps if step.stage == stage]
        losses = [step.loss for step in steps]
        if has_own:
            losses = [step.stratum_losses[s] if step.stratum_losses else np.nan for step in steps]
        drawn |= draw_line(top, [step.step for step in steps], losses, color=style["color"])
    if not drawn:
        _svg.empty(top, "no training loss was logged")
    top.set_title("training loss (nats per event)")
    _validation(run, s, bottom)
    bottom.set_title("validation NDCG@10")
    _svg.step_axis(bottom)
    _shade_heads(run, (top, bottom))
    _svg.legend(fig, bottom)
    whose = "this stratum's" if has_own else "all users' (this rule logs no stratum losses)"
    caption = (
        f"Top: {whose} training loss in nats per event at logged steps (bold: running mean); "
        "bottom: its NDCG@10 (0 to 1, higher is better) on the validation events after each epoch, "
        "a star on the epoch that was kept"
        + (", the plugin-head stage shaded." if "heads" in run.stages else ".")
    )
    title = f"Stratum {s}: {run.strata[s].name}"
    svg = _svg.to_svg(fig, f"stratum-{s}", f"{title}: training loss and validation NDCG@10")
    return Plot(f"stratum-{s}", title, svg, caption)


def _validation(run: RunFiles, s: int, ax: Axes) -> None:
    drawn = False
    for stage, facts in run.stages.items():
        records = [e for e in run.epochs if e.stage == stage]
        points = [(e.step, e.valid[s + 1], e.epoch) for e in records if e.valid]
        points = [point for point in points if np.isfinite(point[1])]
        if not points:
            continue
        drawn = True
        steps, values, epochs = zip(*points, strict=True)
        colour = _svg.STAGE_COLOURS[stage]
        ax.plot(steps, values, color=colour, marker=".", label=_svg.STAGE_LABELS[stage])
        kept = facts.best_epochs[s if stage == "heads" else 0]
        if kept in epochs:
            at = epochs.index(kept)
            ax.plot(
                steps[at], values[at], marker="*", markersize=11, color=colour, linestyle="none"
            )
    if not drawn:
        _svg.empty(ax, "no validation was logged for this stratum")


def _shade_heads(run: RunFiles, axes: Sequence[Axes]) -> None:
    ends = [e.step for e in run.epochs if e.stage == "backbone"]
    heads = [r.step for records in (run.steps, run.epochs) for r in records if r.stage == "heads"]
    if heads:
        span = (max(ends, default=0), max(heads))
        for ax in axes:
            ax.axvspan(*span, color=_svg.STAGE_COLOURS["heads"], alpha=0.1, linewidth=0)


def gradients(run: RunFiles, steps: Sequence[StepRecord]) -> Plot:
    """Draw the norms of the stratum gradients and the cosines between them."""
    fig, (top, bottom) = _svg.figure(rows=2, height=4.2)
    for s, style in enumerate(_svg.stratum_styles(run.num_strata)):
        norms = [step.norms[s] if step.norms else np.nan for step in steps]
        draw_line(top, [step.step for step in steps], norms, label=run.strata[s].name, **style)
    top.set_title("norm of the stratum gradient")
    _svg.from_zero(top)
    pairs = list(itertools.combinations(range(run.num_strata), 2))
    cosines = np.array(
        [[step.cosines[a][b] if step.cosines else np.nan for a, b in pairs] for step in steps]
    )
    known = np.isfinite(cosines).any(axis=1)
    x, cosines = np.array([step.step for step in steps])[known], cosines[known]
    shown = "each pair of strata"
    if not len(x):
        _svg.empty(bottom, "no cosines were logged")
    elif len(pairs) <= _MAX_PAIRS:
        names = [f"{run.strata[a].name} / {run.strata[b].name}" for a, b in pairs]
        _cosine_lines(bottom, x, cosines, names)
    else:
        shown = f"the {len(pairs)} pairs of strata (line: mean, band: least to greatest)"
        _cosine_band(bottom, x, cosines)
    bottom.axhline(0, color=_svg.MUTED, linewidth=0.8)
    bottom.set_title("cosine between stratum gradients")
    _svg.step_axis(bottom)
    _svg.legend(fig, top)
    if 1 < len(pairs) <= _MAX_PAIRS:
        _svg.legend(fig, bottom, columns=2, side="lower")
    caption = (
        "Top: norm of each stratum's gradient over all backbone parameters (loss per unit of "
        f"parameter); bottom: cosine (-1 to 1, no unit) between the gradients of {shown}; below 0 "
        "two strata pull against each other."
    )
    title = "Stratum gradients"
    return Plot("gradients", title, _svg.to_svg(fig, "gradients", title), caption)


def _cosine_lines(ax: Axes, x: IntArray, cosines: FloatArray, names: Sequence[str]) -> None:
    styles = _svg.stratum_styles(len(names)) if len(names) > 1 else [{"color": _svg.INK}]
    for values, name, style in zip(cosines.T, names, styles, strict=True):
        draw_line(ax, x, values, label=name, **style)


def _cosine_band(ax: Axes, x: IntArray, cosines: FloatArray) -> None:
    steps, low = thinned(x, np.nanmin(cosines, axis=1))
    high = thinned(x, np.nanmax(cosines, axis=1))[1]
    ax.fill_between(steps, low, high, color=_svg.MUTED, alpha=0.2, linewidth=0)
    ax.plot(*thinned(x, np.nanmean(cosines, axis=1)), color=_svg.INK)


def weights(run: RunFiles, steps: Sequence[StepRecord]) -> Plot:
    """Draw the rule's weight of each stratum."""
    fig, (ax,) = _svg.figure()
    for s, style in enumerate(_svg.stratum_styles(run.num_strata)):
        values = [step.weights[s] if step.weights else np.nan for step in steps]
        draw_line(ax, [step.step for step in steps], values, label=run.strata[s].name, **style)
    _svg.from_zero(ax)
    ax.set_ylabel("weight")
    _svg.step_axis(ax)
    _svg.legend(fig, ax)
    caption = (
        f"Weight (no unit) that the rule {run.rule} gave each stratum's gradient in the backbone "
        "stage; for rules that weigh each parameter apart, the mean over parameters."
    )
    return Plot("weights", "Rule weights", _svg.to_svg(fig, "weights", "Rule weights"), caption)


def throughput(run: RunFiles) -> Plot:
    """Draw the training events per second."""
    fig, (ax,) = _svg.figure()
    for stage in run.stages:
        steps = [step for step in run.steps if step.stage == stage]
        x, speed = thinned([r.step for r in steps], [r.events_per_second for r in steps])
        ax.plot(
            x,
            speed,
            label=_svg.STAGE_LABELS[stage],
            color=_svg.STAGE_COLOURS[stage],
            marker=_svg.STAGE_MARKERS[stage] if len(x) < 3 else None,
        )
    _svg.from_zero(ax)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_ylabel("events per second")
    _svg.step_axis(ax)
    _svg.legend(fig, ax)
    caption = (
        "Training events per second, averaged from the beginning of the stage to the step, "
        "evaluation left out."
    )
    svg = _svg.to_svg(fig, "throughput", "Throughput in events per second")
    return Plot("throughput", "Throughput", svg, caption)
