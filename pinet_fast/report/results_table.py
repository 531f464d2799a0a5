"""Runs beside published figures: one row a log, model, loss and rule, seeds averaged."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.report.run_files import RunFiles

METRICS = ("ndcg@10", "hr@10")
_FAR = 0.95  # a run below that share of the published figure is coloured


@dataclass(frozen=True)
class Published:
    """A figure of others.

    Attributes:
        data: Name of the log's file without its suffix.
        model: The model.
        loss: Its loss; None where it has none.
        values: By metric.
        protocol: How it was measured, as far as it is known.
        source: Where it stands.
    """

    data: str
    model: str
    loss: str | None
    values: dict[str, float]
    protocol: str
    source: str


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds only, and the figure that they stand beside.

    Attributes:
        data: Name of the log's file without its suffix.
        model: The model.
        loss: The loss.
        rule: The rule, with its prior, and the heads where the runs have them.
        protocol: ``full`` ranking, or the number and kind of negatives.
        runs: How many.
        means: Mean over the runs, by metric.
        ranges: Least and greatest of the runs, by metric.
        tail: Mean NDCG@10 of the least active stratum.
        head: Mean NDCG@10 of the most active stratum.
        minutes: Mean training time, evaluation left out.
        published: The figure for this log, model and loss, under full ranking; None without one.
        simulated: Whether the log is simulated.
    """

    data: str
    model: str
    loss: str
    rule: str
    protocol: str
    runs: int
    means: dict[str, float]
    ranges: dict[str, tuple[float, float]]
    tail: float | None
    head: float | None
    minutes: float
    published: Published | None
    simulated: bool


def published_figures() -> tuple[Published, ...]:
    """Return the figures of others that the package knows."""
    text = files("pinet_fast.report").joinpath("published.json").read_text(encoding="utf-8")
    return tuple(
        Published(
            entry["data"], entry["model"], entry["loss"],
            {metric: entry[metric] for metric in METRICS}, entry["protocol"], entry["source"],
        )
        for entry in json.loads(text)["figures"]
    )  # fmt: skip


def results_rows(runs: Sequence[RunFiles]) -> list[Row]:
    """Return the rows of runs, in the order in which their first run comes.

    Args:
        runs: Any finished runs, of any logs. Runs are one row if all options but the seed, the
            place of the log and the threads are the same.
    """
    known = {(p.data, p.model, p.loss): p for p in published_figures()}
    together: dict[str, list[RunFiles]] = defaultdict(list)
    for run in runs:
        own = {k: v for k, v in run.config.items() if k not in ("seed", "data", "threads")}
        together[json.dumps([run.data.fingerprint, own], sort_keys=True)].append(run)
    return [_row(same, known) for same in together.values()]


def _row(runs: list[RunFiles], known: dict[tuple[str, str, str | None], Published]) -> Row:
    first = runs[0]
    data, config = PurePath(first.data.name).stem, first.config
    finals = [run.test[run.final] for run in runs]
    values = {m: [f.overall.metrics[m].mean or 0.0 for f in finals] for m in METRICS}
    negatives = config.get("eval_negatives", 0)
    heads = f" + {config.get('head', 'plugin')} heads" if first.final == "heads" else ""
    seconds = [sum(stage.seconds for stage in run.stages.values()) for run in runs]
    key = (data, str(config["model"]), str(config["loss"]))
    return Row(
        data=data,
        model=key[1],
        loss=key[2],
        rule=first.rule + heads,
        protocol=f"{negatives} {config.get('eval_dist', 'uniform')}" if negatives else "full",
        runs=len(runs),
        means={m: sum(v) / len(v) for m, v in values.items()},
        ranges={m: (min(v), max(v)) for m, v in values.items()},
        tail=_mean([f.strata[0].metrics["ndcg@10"].mean for f in finals]),
        head=_mean([f.strata[-1].metrics["ndcg@10"].mean for f in finals]),
        minutes=sum(seconds) / len(seconds) / 60,
        published=None if negatives else known.get(key),
        simulated=first.data.simulated,
    )


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def as_rich_table(rows: Sequence[Row]) -> Table:
    """Return the rows for a terminal; sources of published figures stand below."""
    sources = {row.published.source: None for row in rows if row.published}
    number = {source: i for i, source in enumerate(sources, start=1)}
    notes = [f"[{i}] {source}" for source, i in number.items()]
    notes += sorted({f"{r.data}: published under {r.published.protocol}" for r in rows
                     if r.published})  # fmt: skip
    table = Table(
        title="Test metrics, means over seeds; below, the least and the greatest"
        + ("; SIMULATED DATA" if any(row.simulated for row in rows) else ""),
        title_justify="left",
        caption=Text("\n".join(notes)), caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for name in ("log", "model", "rule", "ranked"):
        table.add_column(name, overflow="fold")
    for name in ("runs", "NDCG@10", "HR@10", "tail / head", "published", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            Text(row.data),
            f"{row.model} {row.loss}",
            Text(row.rule),
            row.protocol,
            str(row.runs),
            *(_with_range(row, metric) for metric in METRICS),
            f"{_shown(row.tail)} / {_shown(row.head)}",
            *_published(row, number),
        )
    return table


def _with_range(row: Row, metric: str) -> str:
    low, high = row.ranges[metric]
    spread = f"\n{low:.4f}-{high:.4f}" if row.runs > 1 else ""
    return f"{row.means[metric]:.4f}{spread}"


def _published(row: Row, number: dict[str, int]) -> tuple[Text, Text]:
    if row.published is None:
        return Text("-", style="dim"), Text("")
    value, ratio = row.published.values["ndcg@10"], _ratio(row)
    assert ratio is not None
    mark = Text(f"{value:.4f} [{number[row.published.source]}]")
    return mark, Text(f"{ratio:.2f}", style="red" if ratio < _FAR else "green")


def _ratio(row: Row) -> float | None:
    return row.means["ndcg@10"] / row.published.values["ndcg@10"] if row.published else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON values, with the ratio to the published NDCG@10."""
    return [asdict(row) | {"ratio": _ratio(row)} for row in rows]


def as_table_csv(rows: Sequence[Row]) -> str:
    """Return one line a row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ("data", "model", "loss", "rule", "protocol", "runs")
    metrics = [f"{m}{part}" for m in METRICS for part in ("", "_low", "_high")]
    tail = ("tail_ndcg@10", "head_ndcg@10", "minutes", "published_ndcg@10", "published_hr@10",
            "ratio", "published_protocol", "source", "simulated")  # fmt: skip
    writer.writerow([*header, *metrics, *tail])
    for row in rows:
        values = [getattr(row, name) for name in header]
        for metric in METRICS:
            values += [row.means[metric], *row.ranges[metric]]
        found = row.published
        values += [row.tail, row.head, row.minutes]
        values += [found.values[m] if found else None for m in METRICS]
        values += [_ratio(row), found.protocol if found else None, found.source if found else None]
        writer.writerow([*values, row.simulated])
    return out.getvalue()
