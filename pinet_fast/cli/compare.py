"""``pinet-fast compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pinet_fast.cli.console import Output, output
from pinet_fast.errors import ConfigError
from pinet_fast.report import Comparison, RunFiles, as_csv, as_dict, as_rich, write_report
from pinet_fast.report.activeness_plot import checked_suffix
from pinet_fast.report.comparison_plot import plot_comparison
from pinet_fast.training.run_folder import RunFolder


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the first is the baseline.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write a CSV file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Also draw NDCG@10 by stratum: FILE.png or FILE.svg."),
    ] = None,
    reports: Annotated[
        bool,
        typer.Option(
            "--reports", help="Write report.html of all but the first anew, with the differences."
        ),
    ] = False,
) -> None:
    """Print runs side by side, stratum by stratum, with deltas to the first.

    Examples:
        pinet-fast compare runs/joint runs/agreement

        pinet-fast compare runs/joint runs/agreement --reports

        pinet-fast compare runs/joint runs/* --csv all.csv --plot all.svg
    """
    if len(runs) < 2:
        raise ConfigError("compare: expected two run folders or more, as in compare RUN RUN")
    if plot is not None:
        checked_suffix(plot)
    shown = output(as_json=as_json)
    comparison = Comparison.of([RunFiles.load(path) for path in runs])
    if csv is not None:
        try:
            csv.write_text(as_csv(comparison))
        except OSError as error:
            raise ConfigError(f"--csv {csv}: cannot write there ({error.strerror})") from None
    if plot is not None:
        plot_comparison(plot, comparison)
    if reports:
        baseline = comparison.runs[0]
        for run in comparison.runs[1:]:
            if run.path.resolve() != baseline.path.resolve():
                write_report(run, RunFolder(run.path).report, baseline)
    if as_json:
        shown.print_json(json.dumps(as_dict(comparison)))
    else:
        show(comparison, shown)


def show(comparison: Comparison, shown: Output) -> None:
    """Print a comparison's tables."""
    for table in as_rich(comparison):
        shown.out.print(table)
