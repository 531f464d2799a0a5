"""Markdown tables of the training runs of benchmarks/published, from their kept summaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.harness.markdown import grid
from benchmarks.published.__main__ import SUMMARIES, listed
from pinet_fast.report import RunSummary
from pinet_fast.report.results_table import results_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pinet_fast.report.results_table import Row

COMPARED = "compare-"  # names of runs that are compared with joint training
CLICKS = "din"  # names of runs that score candidates


def summaries(folder: Path = SUMMARIES) -> dict[str, list[RunSummary]]:
    """Return the kept summaries by the name of their run, in the order of runs.toml."""
    found: dict[str, list[RunSummary]] = {}
    for run in listed():
        file = run.summary(folder)
        if file.exists():
            found.setdefault(run.name, []).append(RunSummary.load(file))
    return found


def published(folder: Path = SUMMARIES) -> str:
    """Runs under full ranking beside the figures of others."""
    rows, sources = [], {}
    for name, runs in summaries(folder).items():
        if name.startswith((COMPARED, CLICKS)):
            continue
        (row,) = results_rows(runs)
        mark, ratio = "", ""
        if row.published is not None:
            figure = row.published.values["ndcg@10"]
            number = sources.setdefault(row.published.source, len(sources) + 1)
            mark, ratio = f"{figure:.4f} [{number}]", f"{row.ratio:.2f}"
        rows.append([
            f"`{name}`", row.data, f"{row.model}, {row.loss}", str(row.runs), _spread(row),
            f"{row.means['hr@10']:.4f}", f"{_number(row.tail)} / {_number(row.head)}", mark, ratio,
            f"{row.minutes:.0f} min",
        ])  # fmt: skip
    head = ["run", "log", "model, loss", "seeds", "NDCG@10", "HR@10", "tail / head", "published",
            "ratio", "training"]  # fmt: skip
    notes = "; ".join(f"[{number}] {source}" for source, number in sources.items())
    return f"{grid(head, rows)}\n\n*{notes}.*" if rows else ""


def clicks(folder: Path = SUMMARIES) -> str:
    """AUC and GAUC of candidates, beside ranking by popularity."""
    rows = []
    for name, runs in summaries(folder).items():
        if name.startswith(CLICKS):
            (row,) = results_rows(runs)
            figures = [f"{row.clicks[key]:.4f}" for key in
                       ("auc", "popularity_auc", "gauc", "popularity_gauc")]  # fmt: skip
            rows.append([f"`{name}`", row.data, row.model, str(row.runs), *figures])
    head = ["run", "log", "model", "seeds", "AUC", "by popularity", "GAUC", "by popularity"]
    return grid(head, rows) if rows else ""


def compared(folder: Path = SUMMARIES) -> str:
    """Rules, without and with heads, against joint training of the same log."""
    rows = []
    known = {name: results_rows(runs) for name, runs in summaries(folder).items()}
    for name, found in known.items():
        if not name.startswith(COMPARED):
            continue
        log = name.removeprefix(COMPARED).split("-")[0]
        joint = known.get(f"{COMPARED}{log}-joint", [None])[0]
        rows += [
            [row.data, row.rule, str(row.runs), _spread(row),
             _against(row, joint, lambda r: r.tail), _against(row, joint, lambda r: r.head)]
            for row in found
        ]  # fmt: skip
    head = ["log", "rule", "seeds", "NDCG@10", "tail", "head"]
    return grid(head, rows) if rows else ""


def _against(row: Row, joint: Row | None, of: Callable[[Row], float | None]) -> str:
    value, base = of(row), None if joint is None else of(joint)
    if value is None or not base or row is joint:
        return _number(value)
    return f"{value:.4f} ({value / base - 1:+.1%})"


def _spread(row: Row) -> str:
    low, high = row.ranges["ndcg@10"]
    spread = f" [{low:.4f}, {high:.4f}]" if row.runs > 1 else ""
    return f"{row.means['ndcg@10']:.4f}{spread}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def versions(folder: Path = SUMMARIES) -> str:
    """Return what the runs were made with."""
    runs = [run for found in summaries(folder).values() for run in found]
    torch = sorted({run.versions["torch"] for run in runs})
    days = sorted(run.finished_at[:10] for run in runs)
    span = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return (
        f"*torch {', '.join(torch)}, one thread a run; {span}; `python -m benchmarks.published`. "
        "Means over seeds, least and greatest in brackets.*"
    )
