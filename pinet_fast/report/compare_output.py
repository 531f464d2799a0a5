"""Writes a comparison for a terminal, as JSON values and as CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from pinet_fast.report.schema import METRICS

if TYPE_CHECKING:
    from pinet_fast.report.compare import Cell, Comparison

_MAIN = "ndcg@10"
_OTHERS = ("hr@10", "mrr@10", "ndcg@20", "hr@20")
_PER_TABLE = 2  # runs beside the baseline that fit in 100 columns


def as_rich(comparison: Comparison) -> list[Table]:
    """Return tables for a terminal of 100 columns: NDCG@10, other metrics, the runs."""
    others = range(1, len(comparison.runs))
    chunks = [others[i : i + _PER_TABLE] for i in range(0, len(others), _PER_TABLE)]
    tables = [_main_table(comparison, chunk) for chunk in chunks]
    tables += [_other_metrics(comparison, chunk) for chunk in chunks]
    return [*tables, _run_table(comparison)]


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as JSON values, every metric included."""
    groups = []
    for g, (name, users) in enumerate(zip(comparison.groups, comparison.users, strict=True)):
        metrics = {
            metric: {
                label: _flat(cell)
                for label, cell in zip(comparison.labels, comparison.cells[metric][g], strict=True)
            }
            for metric in METRICS
        }
        groups.append({"group": name, "users": users, "metrics": metrics})
    runs = [
        {
            "run": label,
            "path": str(run.path),
            "rule": run.config["rule"],
            "model": run.config["model"],
            "loss": run.config["loss"],
            "seed": run.config["seed"],
            "stage": run.final,
        }
        for label, run in zip(comparison.labels, comparison.runs, strict=True)
    ]
    data = comparison.runs[0].data
    return {
        "schema": 1,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "simulated": data.simulated,
        },
        "baseline": comparison.labels[0],
        "runs": runs,
        "groups": groups,
        "notes": list(comparison.notes),
    }


def as_csv(comparison: Comparison) -> str:
    """Return one row a run, group and metric; unknown values are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ("mean", "low", "high", "delta", "delta_low", "delta_high", "relative", "p_value")
    writer.writerow(["run", "stage", "group", "users", "metric", *header, "simulated"])
    for r, (label, run) in enumerate(zip(comparison.labels, comparison.runs, strict=True)):
        for g, (name, users) in enumerate(zip(comparison.groups, comparison.users, strict=True)):
            for metric in METRICS:
                flat = _flat(comparison.cells[metric][g][r])
                values = [flat[key] for key in header]
                writer.writerow(
                    [label, run.final, name, users, metric, *values, run.data.simulated]
                )
    return out.getvalue()


def _flat(cell: Cell) -> dict[str, float | None]:
    return {
        "mean": cell.value.mean,
        "low": cell.value.low,
        "high": cell.value.high,
        "delta": cell.difference.mean,
        "delta_low": cell.difference.low,
        "delta_high": cell.difference.high,
        "relative": cell.relative,
        "p_value": cell.p_value,
    }


def _table(comparison: Comparison, title: str, caption: str = "") -> Table:
    heading = Text(title, style="bold")
    if comparison.simulated:
        heading.append("  SIMULATED DATA", style="bold yellow")
    return Table(
        title=heading,
        caption=Text(caption) if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def _main_table(comparison: Comparison, others: range) -> Table:
    table = _table(
        comparison,
        f"Test NDCG@10 by stratum: {comparison.runs[0].data.name}",
        "Means over users [95% interval]; below, the difference to the baseline and its interval,"
        " paired by user; coloured where that excludes 0; p of a paired permutation test, two-sided"
        " and not corrected for the number of comparisons.",
    )
    table.add_column("stratum", overflow="fold")
    table.add_column("users", justify="right")
    _add_run_columns(table, comparison, others)
    for g, name in enumerate(comparison.groups):
        cells = comparison.cells[_MAIN][g]
        table.add_row(
            Text(name, style="bold" if g == 0 else ""),
            f"{comparison.users[g]:,}",
            _value(cells[0], with_interval=True),
            *(_full(cells[r]) for r in others),
            end_section=True,
        )
    return table


def _other_metrics(comparison: Comparison, others: range) -> Table:
    table = _table(comparison, "Other test metrics")
    table.add_column("stratum", overflow="fold")
    table.add_column("metric")
    _add_run_columns(table, comparison, others)
    for g, name in enumerate(comparison.groups):
        for metric in _OTHERS:
            cells = comparison.cells[metric][g]
            first, last = metric == _OTHERS[0], metric == _OTHERS[-1]
            table.add_row(
                Text(name if first else "", style="bold" if g == 0 else ""),
                metric.upper(),
                _value(cells[0]),
                *(Text.assemble(_value(cells[r]), "  ", _delta(cells[r])) for r in others),
                end_section=last,
            )
    return table


def _run_table(comparison: Comparison) -> Table:
    table = _table(comparison, "Runs", "\n".join(comparison.notes))
    table.add_column("run", overflow="fold")
    # As wide as their longest word, so that a terminal of 80 columns breaks none.
    for name, width in (("rule", 9), ("model, loss", 7), ("final stage", 8)):
        table.add_column(name, overflow="fold", min_width=width)
    for name in ("seed", "epochs", "minutes", "events/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, run in zip(comparison.labels, comparison.runs, strict=True):
        backbone = run.stages["backbone"]
        speed = backbone.events_per_second
        seconds = sum(stage.seconds for stage in run.stages.values())
        table.add_row(
            Text(label),
            Text(run.rule),
            Text(f"{run.config['model']}, {run.config['loss']}"),
            run.final,
            str(run.config["seed"]),
            " + ".join(str(stage.epochs) for stage in run.stages.values()),
            f"{seconds / 60:.1f}",
            "-" if speed is None else f"{speed:,.0f}",
        )
    return table


def _add_run_columns(table: Table, comparison: Comparison, others: range) -> None:
    for r in (0, *others):
        role = "baseline" if r == 0 else comparison.runs[r].final
        header = Text.assemble(comparison.labels[r], "\n", (role, "dim"))
        table.add_column(header, justify="right", overflow="fold", min_width=16)


def _full(cell: Cell) -> Text:
    lines = [_value(cell, with_interval=True), _delta(cell)]
    difference = cell.difference
    if difference.low is not None and difference.high is not None:
        interval = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
        lines.append(Text(interval, style=_colour(cell)))
    if cell.p_value is not None:
        lines.append(Text(f"p {cell.p_value:.4f}", style="dim"))
    return Text("\n").join(lines)


def _value(cell: Cell, *, with_interval: bool = False) -> Text:
    value = cell.value
    if value.mean is None:
        return Text("-", style="dim")
    text = Text(f"{value.mean:.4f}")
    if with_interval and value.low is not None and value.high is not None:
        text.append(f" [{value.low:.4f}, {value.high:.4f}]", style="dim")
    return text


def _delta(cell: Cell) -> Text:
    if cell.difference.mean is None:
        return Text("")
    relative = "" if cell.relative is None else f" ({cell.relative:+.1%})"
    return Text(f"{cell.difference.mean:+.4f}{relative}", style=_colour(cell))


def _colour(cell: Cell) -> str:
    if not cell.difference.excludes_zero or cell.difference.low is None:
        return ""
    return "green" if cell.difference.low > 0 else "red"
