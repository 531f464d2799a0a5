"""Results of a run as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pinet_fast.cli.console import Output


def print_results(metrics: dict[str, Any], part: str, shown: Output) -> None:
    """Print ranking metrics by stratum, and clicks where candidates were scored.

    Args:
        metrics: As metrics.json holds them.
        part: ``test`` or ``valid``.
        shown: Where to print.
    """
    final, config = metrics[part][metrics["final"]], metrics["config"]
    simulated = " - SIMULATED DATA" if metrics["data"]["simulated"] else ""
    against = f"{config['eval_negatives']} negatives" if config["eval_negatives"] else "full"
    table = Table(title=f"{part}, {against} ranking, {metrics['final']}{simulated}")
    for column in ("stratum", "users", "NDCG@10", "HR@10", "MRR@10"):
        table.add_column(column, justify="left" if column == "stratum" else "right")
    names = ["overall", *(s["name"] for s in metrics["strata"])]
    for name, group in zip(names, [final["overall"], *final["strata"]], strict=True):
        means = [group[f"{metric}@10"]["mean"] for metric in ("ndcg", "hr", "mrr")]
        table.add_row(name, f"{group['users']:,}", *map(_number, means))
    shown.out.print(table)
    if metrics["clicks"][part]:
        _print_clicks(metrics, part, names, shown)


def _print_clicks(metrics: dict[str, Any], part: str, names: list[str], shown: Output) -> None:
    """Print AUC, GAUC and log loss by stratum, and on the test part those of popularity."""
    own = metrics["clicks"][part][metrics["final"]]
    popular = metrics["baselines"]["popularity"]["clicks"] if part == "test" else None
    table = Table(title=f"{part} clicks, {metrics['final']}")
    columns = ["stratum", "AUC", "GAUC", "log loss"]
    columns += [] if popular is None else ["popularity AUC", "GAUC"]
    for column in columns:
        table.add_column(column, justify="left" if column == "stratum" else "right")
    for g, name in enumerate(names):
        cells = [_group(own, g)[m]["mean"] for m in ("auc", "gauc", "log_loss")]
        if popular is not None:
            cells += [_group(popular, g)[m]["mean"] for m in ("auc", "gauc")]
        table.add_row(name, *map(_number, cells))
    shown.out.print(table)


def _group(evaluation: dict[str, Any], index: int) -> dict[str, Any]:
    groups: list[dict[str, Any]] = [evaluation["overall"], *evaluation["strata"]]
    return groups[index]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
