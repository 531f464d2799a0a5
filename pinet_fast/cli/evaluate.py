"""``pinet-fast evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pinet_fast.cli.console import output
from pinet_fast.cli.progress import ProgressObserver
from pinet_fast.cli.run_summary import print_results
from pinet_fast.data.compiling import told
from pinet_fast.training.evaluating import evaluate_run


def evaluate(
    run: Annotated[Path, typer.Argument(help="A finished run folder; it is left as it is.")],
    part: Annotated[str, typer.Option("--part", help="test or valid.")] = "test",
    eval_negatives: Annotated[
        int | None,
        typer.Option(
            "--eval-negatives", help="Frozen negatives to rank against; 0 = the catalogue. "
            "Default: as the run was.", show_default=False,
        ),
    ] = None,
    eval_dist: Annotated[
        str | None,
        typer.Option("--eval-dist", help="How they are drawn: uniform or popularity. Default: as "
                     "the run's.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:  # fmt: skip
    """Rank the held-out events again with the model that a run kept, by another protocol too.

    Examples:
        pinet-fast evaluate runs/joint

        pinet-fast evaluate runs/joint --eval-negatives 100 --eval-dist popularity --json
    """
    shown = output(as_json=as_json, quiet=quiet)
    with ProgressObserver(shown.err, quiet=shown.quiet) as observer, told(observer.note):
        metrics = evaluate_run(
            run, part=part, eval_negatives=eval_negatives, eval_dist=eval_dist, observer=observer
        )
    if as_json:
        shown.print_json(json.dumps(metrics))
    else:
        print_results(metrics, part, shown)
