"""Compares finished runs, stratum by stratum, with the first one as the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pinet_fast.errors import ConfigError
from pinet_fast.report.bootstrap import paired_differences
from pinet_fast.report.schema import METRICS, IntArray, Interval
from pinet_fast.report.significance import permutation_p_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.report.run_files import RunFiles

_NOTHING = Interval(None, None, None)


@dataclass(frozen=True)
class Cell:
    """One metric of one group of users in one run.

    Attributes:
        value: The metric, with its 95% bootstrap interval over users.
        difference: Its difference to the baseline. The mean is None for the baseline itself; the
            interval, paired by user, is None also where the runs tested different users.
        relative: The difference as a share of the baseline; None where that is 0 or unknown.
        p_value: Of a paired permutation test against the baseline, two-sided, not corrected for
            many comparisons; None where the interval of the difference is.
    """

    value: Interval
    difference: Interval
    relative: float | None
    p_value: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs on the same log and strata, side by side.

    Attributes:
        runs: The runs; the first is the baseline.
        labels: A distinct name for each.
        groups: ``overall`` and then the strata, from least to most active.
        users: Test users of each group in the baseline.
        cells: By metric, then group, then run, in the order of these attributes.
        notes: What a reader must know: options that differ, intervals that could not be had.
    """

    runs: tuple[RunFiles, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    users: tuple[int, ...]
    cells: dict[str, tuple[tuple[Cell, ...], ...]]
    notes: tuple[str, ...]

    @property
    def simulated(self) -> bool:
        """Return whether the log is simulated."""
        return self.runs[0].data.simulated

    @classmethod
    def of(cls, runs: Sequence[RunFiles]) -> Comparison:
        """Compare the test metrics of the runs' final stages.

        Args:
            runs: Two runs or more; the first is the baseline.

        Raises:
            ConfigError: Fewer than two runs, or runs on different logs or strata.
        """
        if len(runs) < 2:
            raise ConfigError(f"compare: expected two runs or more, got {len(runs)}; name another")
        baseline = runs[0]
        labels = _labels(runs)
        notes = []
        columns = []
        for run, label in zip(runs, labels, strict=True):
            _check_comparable(baseline, run)
            pairs = None if run is baseline else _paired(baseline, run)
            if run is not baseline:
                notes += _notes(baseline, run, label, is_paired=pairs is not None)
            columns.append(_column(baseline, run, pairs))
        groups = range(len(baseline.group_names))
        return cls(
            runs=tuple(runs),
            labels=labels,
            groups=baseline.group_names,
            users=tuple(g.users for g in baseline.test[baseline.final].groups),
            cells={m: tuple(tuple(c[m][g] for c in columns) for g in groups) for m in METRICS},
            notes=tuple(notes),
        )


def _column(baseline: RunFiles, run: RunFiles, paired: _Paired | None) -> dict[str, list[Cell]]:
    """Return a run's cells, by metric and group."""
    column: dict[str, list[Cell]] = {metric: [] for metric in METRICS}
    base_groups, groups = baseline.test[baseline.final].groups, run.test[run.final].groups
    for index, (base_group, group) in enumerate(zip(base_groups, groups, strict=True)):
        for metric in METRICS:
            value, base = group.metrics[metric], base_group.metrics[metric]
            difference, relative, p_value = _NOTHING, None, None
            if run is not baseline and value.mean is not None and base.mean is not None:
                mean = value.mean - base.mean
                interval = paired.intervals[index][metric] if paired else _NOTHING
                difference = Interval(mean, interval.low, interval.high)
                relative = mean / base.mean if base.mean else None
                p_value = paired.p_values[index][metric] if paired else None
            column[metric].append(Cell(value, difference, relative, p_value))
    return column


@dataclass(frozen=True)
class _Paired:
    """Differences to the baseline and their p-values, by group and metric."""

    intervals: list[dict[str, Interval]]
    p_values: list[dict[str, float]]


@dataclass(frozen=True)
class PairedRanks:
    """Ranks of the same users in the same order, under the final stages of two runs.

    Attributes:
        first: Under the baseline.
        second: Under the run.
        order: Where these users are among the baseline's.
    """

    first: IntArray
    second: IntArray
    order: IntArray


def paired_ranks(baseline: RunFiles, run: RunFiles) -> PairedRanks | None:
    """Return the ranks of two runs user by user, or None where the users are not the same."""
    order, base_order = np.argsort(run.ranks.users), np.argsort(baseline.ranks.users)
    if not np.array_equal(run.ranks.users[order], baseline.ranks.users[base_order]):
        return None
    return PairedRanks(
        baseline.ranks.by_stage[baseline.final][base_order],
        run.ranks.by_stage[run.final][order],
        base_order,
    )


def _paired(baseline: RunFiles, run: RunFiles) -> _Paired | None:
    """Return the paired differences of every group, or None where the users are not the same."""
    pairs = paired_ranks(baseline, run)
    if pairs is None:
        return None
    base_ranks, ranks = pairs.first, pairs.second
    masks = [mask[pairs.order] for mask in baseline.ranks.masks(baseline.num_strata)]
    return _Paired(
        [paired_differences(base_ranks[mask], ranks[mask]) for mask in masks],
        [permutation_p_values(base_ranks[mask], ranks[mask]) for mask in masks],
    )


def _check_comparable(baseline: RunFiles, run: RunFiles) -> None:
    if run.data.fingerprint != baseline.data.fingerprint:
        raise ConfigError(
            f"compare: {run.path} was trained on another log ({run.data.name}, fingerprint "
            f"{run.data.fingerprint[:12]}) than {baseline.path} ({baseline.data.name}, "
            f"{baseline.data.fingerprint[:12]}), so their metrics cannot be compared; choose runs "
            "on one log"
        )
    if _protocol(run) != _protocol(baseline):
        (mine, how), (theirs, other) = _protocol(run), _protocol(baseline)
        raise ConfigError(
            f"compare: {run.path} was ranked against {mine or 'all'} {how} negatives and "
            f"{baseline.path} against {theirs or 'all'} {other} ones, so their metrics cannot be "
            "compared; rank one again: pinet-fast evaluate RUN --eval-negatives N"
        )
    ours = [stratum.edges for stratum in run.strata]
    theirs = [stratum.edges for stratum in baseline.strata]
    if ours != theirs:
        raise ConfigError(
            f"compare: {run.path} has other strata ({_strata(run)}) than {baseline.path} "
            f"({_strata(baseline)}), so their metrics cannot be compared; choose runs with equal "
            "--strata"
        )


def _protocol(run: RunFiles) -> tuple[object, object]:
    """Return against how many negatives, and which, targets were ranked; 0 is the catalogue."""
    return run.config.get("eval_negatives", 0), run.config.get("eval_dist", "uniform")


def _strata(run: RunFiles) -> str:
    return ", ".join(
        f"{s.name}: {s.users:,} users with {s.min_activeness}-{s.max_activeness} events"
        for s in run.strata
    )


def _labels(runs: Sequence[RunFiles]) -> tuple[str, ...]:
    """Return the runs' names; where they repeat, with the folder above, or numbered."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    return tuple(
        name if names.count(name) == 1 else f"{name} #{index}"
        for index, name in enumerate(names, start=1)
    )


def _notes(baseline: RunFiles, run: RunFiles, label: str, *, is_paired: bool) -> list[str]:
    notes = []
    keys = [*baseline.config, *(key for key in run.config if key not in baseline.config)]
    changed = [
        f"{key} {_shown(run.config.get(key))} (baseline: {_shown(baseline.config.get(key))})"
        for key in keys
        if key != "data" and run.config.get(key) != baseline.config.get(key)
    ]
    if changed:
        notes.append(f"{label} differs from the baseline in: {', '.join(changed)}")
    if not is_paired:
        notes.append(
            f"{label} was tested on other users than the baseline, so its differences have no "
            "intervals"
        )
    return notes


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unset" if value is None else str(value)
