"""``pinet-fast table``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pinet_fast.cli.console import output
from pinet_fast.errors import ConfigError
from pinet_fast.report import RunSummary
from pinet_fast.report.results_table import (
    as_clicks_table,
    as_dicts,
    as_rich_table,
    as_table_csv,
    results_rows,
)


def table(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, of any logs and seeds, or copies of their metrics.json."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write a CSV file.")] = None,
) -> None:
    """Print runs beside published figures for the same file and loss; seeds are averaged.

    Examples:
        pinet-fast table runs/beauty-ce/seed-* runs/ml-1m-bce

        pinet-fast table runs/* --csv results.csv

        pinet-fast table benchmarks/results/runs/*/*.json
    """
    shown = output(as_json=as_json)
    rows = results_rows([RunSummary.load(path) for path in runs])
    if csv is not None:
        try:
            csv.write_text(as_table_csv(rows))
        except OSError as error:
            raise ConfigError(f"--csv {csv}: cannot write there ({error.strerror})") from None
    if as_json:
        shown.print_json(json.dumps(as_dicts(rows)))
    else:
        shown.out.print(as_rich_table(rows))
        clicks = as_clicks_table(rows)
        if clicks is not None:
            shown.out.print(clicks)
