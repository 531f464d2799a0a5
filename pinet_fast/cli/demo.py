"""``pinet-fast demo``: the method end to end, in minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pinet_fast.cli.compare import show
from pinet_fast.cli.console import output
from pinet_fast.cli.train import run
from pinet_fast.data import simulate_log
from pinet_fast.errors import ConfigError
from pinet_fast.report import Comparison, RunFiles
from pinet_fast.training import RunConfig
from pinet_fast.training.run_folder import RunFolder


def demo(
    data: Annotated[
        Path | None, typer.Option("--data", help="A real log; default: a simulated one.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the demo's runs.")] = Path("demo"),
    rule: Annotated[str, typer.Option("--rule", help="The deconfounded run's rule.")] = "agreement",
    epochs: Annotated[int, typer.Option("--epochs", help="Most epochs of each run.")] = 12,
    order: Annotated[str, typer.Option("--order", help="auto, timestamp or rows.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed.")] = 0,
) -> None:
    """Train joint, then deconfounded with plugin heads, and compare them by stratum."""
    if rule == "joint":
        raise ConfigError("--rule joint: the demo compares it with another rule; use agreement")
    shown = output()
    joint, deconfounded = out / "joint", out / f"{rule}-heads"
    for folder in (joint, deconfounded):
        if folder.exists():
            raise ConfigError(f"--out {out}: holds {folder.name} already; delete it, or use --out")
    if data is None:
        shown.err.print("no --data: the log is SIMULATED, and so is every number that follows")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot write there ({error.strerror})") from None
        data = simulate_log(out / "simulated.parquet", seed=seed)
    config = RunConfig(
        data=str(data), rule="joint", heads=False, epochs=epochs, patience=3, order=order, seed=seed
    )
    run(config, joint, shown)
    baseline = RunFiles.load(joint)
    run(replace(config, rule=rule, heads=True), deconfounded, shown, baseline=baseline)
    show(Comparison.of([baseline, RunFiles.load(deconfounded)]), shown)
    for folder in (joint, deconfounded):
        shown.out.print(f"report: {RunFolder(folder).report}", highlight=False, soft_wrap=True)
