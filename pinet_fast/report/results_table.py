"""Runs beside published figures: one row a log, model, loss, rule and stage, seeds averaged."""

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

    from pinet_fast.report.run_summary import RunSummary

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
        clicks: Mean AUC and GAUC where candidates were scored, ``auc`` and ``gauc``, and of ranking
            by popularity, ``popularity_auc`` and ``popularity_gauc``; else empty.
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
    clicks: dict[str, float]
    minutes: float
    published: Published | None
    simulated: bool

    @property
    def label(self) -> str:
        """Return what tells the row from others."""
        ranked = "" if self.protocol == "full" else f", among {self.protocol}"
        return f"{self.data}\n{self.model} {self.loss}, {self.rule}{ranked}"

    @property
    def ratio(self) -> float | None:
        """Return NDCG@10 over the published one, or None without one."""
        if self.published is None:
            return None
        return self.means["ndcg@10"] / self.published.values["ndcg@10"]


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


def results_rows(runs: Sequence[RunSummary]) -> list[Row]:
    """Return the rows of runs, in the order in which their first run comes.

    A run with heads gives two rows: its backbone, then the backbone with its heads.

    Args:
        runs: Any finished runs, of any logs. Runs are one row if all options but the seed, the
            place of the log and the threads are the same.
    """
    known = {(p.data, p.model, p.loss): p for p in published_figures()}
    together: dict[str, list[RunSummary]] = defaultdict(list)
    for run in runs:
        own = {k: v for k, v in run.config.items() if k not in ("seed", "data", "threads")}
        together[json.dumps([run.data.fingerprint, own], sort_keys=True)].append(run)
    return [_row(same, stage, known) for same in together.values() for stage in same[0].stages]


def _row(
    runs: list[RunSummary], stage: str, known: dict[tuple[str, str, str | None], Published]
) -> Row:
    first = runs[0]
    data, config = PurePath(first.data.name).stem, first.config
    finals = [run.test[stage] for run in runs]
    values = {m: [f.overall.metrics[m].mean or 0.0 for f in finals] for m in METRICS}
    negatives = config.get("eval_negatives", 0)
    heads = f" + {config.get('head', 'plugin')} heads" if stage == "heads" else ""
    seconds = [sum(s.seconds for n, s in run.stages.items() if n <= stage) for run in runs]
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
        clicks=_clicks(runs, stage),
        minutes=sum(seconds) / len(seconds) / 60,
        published=None if negatives else known.get(key),
        simulated=first.data.simulated,
    )


def _clicks(runs: list[RunSummary], stage: str) -> dict[str, float]:
    found = {}
    for prefix, of in (("", stage), ("popularity_", "popularity")):
        for metric in ("auc", "gauc"):
            intervals = [getattr(run.clicks[of], metric) for run in runs if of in run.clicks]
            mean = _mean([interval.mean for interval in intervals])
            if mean is not None:
                found[prefix + metric] = mean
    return found


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def as_clicks_table(rows: Sequence[Row]) -> Table | None:
    """Return the rows in which candidates were scored, for a terminal; None if there are none."""
    rows = [row for row in rows if row.clicks]
    if not rows:
        return None
    table = Table(
        title="Test AUC and GAUC among candidates, means over seeds", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    table.add_column("log, model, loss, rule, candidates", overflow="fold", min_width=22)
    for name in ("runs", "AUC", "by popularity", "GAUC", "by popularity"):
        table.add_column(name, justify="right")
    for row in rows:
        shown = [
            _shown(row.clicks.get(p + m)) for m in ("auc", "gauc") for p in ("", "popularity_")
        ]
        table.add_row(
            Text(row.label), str(row.runs), *shown,
        )  # fmt: skip
    return table


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
    table.add_column("log, model, loss, rule", overflow="fold", min_width=22)
    for name in ("runs", "NDCG@10", "HR@10", "tail\nhead", "published\nratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        low, high = row.ranges["ndcg@10"]
        spread = f"\n{low:.4f}-{high:.4f}" if row.runs > 1 else ""
        table.add_row(
            Text(row.label),
            str(row.runs),
            f"{row.means['ndcg@10']:.4f}{spread}",
            f"{row.means['hr@10']:.4f}",
            f"{_shown(row.tail)}\n{_shown(row.head)}",
            _published(row, number),
        )
    return table


def _published(row: Row, number: dict[str, int]) -> Text:
    ratio = row.ratio
    if row.published is None or ratio is None:
        return Text("-", style="dim")
    mark = f"{row.published.values['ndcg@10']:.4f} [{number[row.published.source]}]\n"
    return Text(mark).append(f"{ratio:.2f}", style="red" if ratio < _FAR else "green")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON values, with the ratio to the published NDCG@10."""
    return [asdict(row) | {"ratio": row.ratio} for row in rows]


def as_table_csv(rows: Sequence[Row]) -> str:
    """Return one line a row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ("data", "model", "loss", "rule", "protocol", "runs")
    metrics = [f"{m}{part}" for m in METRICS for part in ("", "_low", "_high")]
    clicks = ("auc", "gauc", "popularity_auc", "popularity_gauc")
    tail = ("tail_ndcg@10", "head_ndcg@10", *clicks, "minutes", "published_ndcg@10",
            "published_hr@10",
            "ratio", "published_protocol", "source", "simulated")  # fmt: skip
    writer.writerow([*header, *metrics, *tail])
    for row in rows:
        values = [getattr(row, name) for name in header]
        for metric in METRICS:
            values += [row.means[metric], *row.ranges[metric]]
        found = row.published
        values += [row.tail, row.head, *(row.clicks.get(name) for name in clicks), row.minutes]
        values += [found.values[m] if found else None for m in METRICS]
        values += [row.ratio, found.protocol if found else None, found.source if found else None]
        writer.writerow([*values, row.simulated])
    return out.getvalue()
