"""``pinet-fast profile``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.table import Table

from pinet_fast import _env
from pinet_fast.cli.console import Output, output
from pinet_fast.cli.run_options import resolved
from pinet_fast.cli.train import train
from pinet_fast.data import simulate_log
from pinet_fast.data.compiling import told
from pinet_fast.errors import ConfigError
from pinet_fast.training import RunConfig
from pinet_fast.training.inputs import load_inputs
from pinet_fast.training.observer import Observer
from pinet_fast.training.recipe import Recipe
from pinet_fast.training.run_folder import RunFolder
from pinet_fast.training.step_profile import StepProfile, profile_steps, run_bracketed, warm_up

# Options of a run's config that mean nothing to a few steps, or that the command has itself.
_NOT_TAKEN = frozenset({
    "data", "rule", "epochs", "patience", "stop_on", "eval_every", "eval_negatives", "eval_dist",
    "heads", "head", "head_epochs", "head_lr", "log_every",
})  # fmt: skip
_TAKEN = frozenset(f.name for f in dataclasses.fields(RunConfig)) - _NOT_TAKEN


def profile(
    data: Annotated[
        Path | None, typer.Option("--data", help="The log; default: a simulated one.")
    ] = None,
    rule: Annotated[str, typer.Option("--rule", help="As of train.")] = "agreement",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that are profiled.")] = 20,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before them.")] = 10,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Write a trace that Perfetto opens (ui.perfetto.dev)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes on stderr.")] = False,
    **options: Any,
) -> None:
    """Show where the time of training steps goes, and how to look closer with Nsight Systems.

    Options of data, batches and model are those of train. Run under the nsys command that it
    prints, it marks the steps for Nsight instead of profiling them itself.

    Examples:
        pinet-fast profile

        pinet-fast profile --data log.parquet --loss bce --rule agreement --trace trace.json
    """
    shown = output(as_json=as_json, quiet=quiet)
    if trace is not None and not trace.absolute().parent.is_dir():
        raise ConfigError(f"--trace {trace}: the folder does not exist; make it first")
    with tempfile.TemporaryDirectory() as folder, told(shown.note):
        if data is None:
            shown.note("no --data: the log is SIMULATED")
            data = simulate_log(Path(folder) / "simulated.parquet", seed=options["seed"])
        given = {name: value for name, value in options.items() if value is not None}
        given |= {"data": str(data), "rule": rule, "heads": False}
        config = resolved(given, config_file=None, settings=None)
        inputs = load_inputs(config, _Notes(shown))
        stage = Recipe(config, inputs, RunFolder(Path(folder) / "run"), Observer()).stage1
        batches = warm_up(stage, warmup)
        if _env.under_nsys():
            ms = run_bracketed(stage, batches, steps)
            shown.note(f"{steps} steps of {ms:.1f} ms were marked for Nsight")
            return
        _env.hush_profiler()
        found = profile_steps(stage, batches, steps, trace)
    if as_json:
        content = found.to_dict() | {"trace": trace and str(trace), "nsys": nsys_command()}
        shown.print_json(json.dumps(content))
    else:
        _print(found, trace, shown)


class _Notes(Observer):
    def __init__(self, shown: Output) -> None:
        self.shown = shown

    def note(self, text: str) -> None:
        self.shown.note(text)


def nsys_command(arguments: list[str] | None = None) -> str:
    """Return the command line that profiles this command under Nsight Systems.

    Args:
        arguments: What follows ``pinet-fast``; None takes this process's.
    """
    import torch

    own = sys.argv[1:] if arguments is None else arguments
    if own[:1] != ["profile"]:
        own = ["profile"]
    command = ["nsys", "profile", "--output", "pinet_fast"]
    if torch.cuda.is_available():
        command += ["--trace", "cuda,nvtx,osrt", "--capture-range", "cudaProfilerApi",
                    "--capture-range-end", "stop"]  # fmt: skip
    else:  # nothing would begin the capture
        command += ["--trace", "nvtx,osrt"]
    return shlex.join([*command, "pinet-fast", *own])


def _print(found: StepProfile, trace: Path | None, shown: Output) -> None:
    table = Table(title=f"{found.steps} steps of {found.ms:.1f} ms, batches included")
    table.add_column("phase")
    for column in ("calls a step", "ms a step", "share"):
        table.add_column(column, justify="right")
    has_device = any(phase.device_ms for phase in found.phases)
    if has_device:
        table.add_column("GPU ms a step", justify="right")
    for phase in found.phases:
        name = f"  of it: {phase.name}" if phase.inside else f"{phase.category}: {phase.name}"
        cells = [f"{phase.calls:.3g}", f"{phase.ms:.3f}", f"{phase.share:.1%}"]
        table.add_row(name, *cells, *([f"{phase.device_ms:.3f}"] if has_device else []))
    table.add_row("rest", "", f"{found.rest_ms:.3f}", f"{found.rest_ms / found.profiled_ms:.1%}")
    shown.out.print(table)
    slower = found.profiled_ms / found.ms
    shown.out.print(
        f"Times are those under torch.profiler, which made a step {slower:.2f} times as long.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if trace is not None:
        shown.out.print(f"trace: {trace} (open it in ui.perfetto.dev)", soft_wrap=True)
    shown.out.print(f"Nsight: {nsys_command()}", highlight=False, soft_wrap=True)


def _take_options_of_train() -> None:
    """Give ``profile`` the options of ``train`` that describe data, batches and model."""
    hints = get_type_hints(train, include_extras=True)
    taken = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, p in inspect.signature(train).parameters.items()
        if name in _TAKEN
    ]
    own = get_type_hints(profile, include_extras=True)
    first = [
        p.replace(annotation=own[name])
        for name, p in inspect.signature(profile).parameters.items()
        if name != "options"
    ]
    profile.__signature__ = inspect.Signature([*first, *taken])  # type: ignore[attr-defined]
    profile.__annotations__ = {p.name: p.annotation for p in [*first, *taken]}


_take_options_of_train()
