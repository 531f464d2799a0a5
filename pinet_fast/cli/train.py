"""``pinet-fast train``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pinet_fast.aggregation.rules import names as rule_names
from pinet_fast.cli.console import Output, output
from pinet_fast.cli.progress import ProgressObserver
from pinet_fast.cli.run_options import given_options, resolved, seed_runs
from pinet_fast.cli.run_summary import print_results
from pinet_fast.data.compiling import told
from pinet_fast.errors import ConfigError
from pinet_fast.heads import head_names
from pinet_fast.models.losses import LOSSES
from pinet_fast.report import RunFiles, write_report
from pinet_fast.training import RunConfig
from pinet_fast.training import train as run_training
from pinet_fast.training.config import MODELS
from pinet_fast.training.run_folder import RunFolder

_LOG = "Log"
_METHOD = "Method"
_BACKBONE = "Backbone"
_BATCHES = "Batches"
_HEADS = "Plugin heads"
_RUN = "Run"


def _option(name: str, text: str, panel: str, known: Sequence[str] = ()) -> Any:
    flag = f"--{name.replace('_', '-')}"
    return typer.Option(
        flag, help=text, rich_help_panel=panel, show_default=True, autocompletion=_among(known)
    )


def _among(known: Sequence[str]) -> Callable[[str], list[str]] | None:
    """Return what completes a value in a shell, or None where any value may be."""
    if not known:
        return None

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="The log: Parquet or CSV.", rich_help_panel=_LOG),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Run folder to make.", rich_help_panel=_RUN),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the checkpoint in --out, with the options it was "
            "started with.", rich_help_panel=_RUN,
        ),
    ] = False,
    user_col: Annotated[str, _option("user_col", "Column of user ids.", _LOG)] = "user",
    item_col: Annotated[str, _option("item_col", "Column of item ids.", _LOG)] = "item",
    time_col: Annotated[str, _option("time_col", "Column of timestamps.", _LOG)] = "timestamp",
    order: Annotated[
        str, _option("order", "auto (timestamps where there are any), timestamp, rows.", _LOG)
    ] = "auto",
    rule: Annotated[
        str, _option("rule", f"One of {', '.join(rule_names())}.", _METHOD, rule_names())
    ] = RunConfig.rule,
    prior: Annotated[
        str, _option("prior", "P(z) of --rule backdoor: uniform, users or events.", _METHOD)
    ] = RunConfig.prior,
    strata: Annotated[
        str,
        _option("strata", "Strata by activeness: head:0.2, quantile:5 or 5,20,100.", _METHOD),
    ] = RunConfig.strata,
    check: Annotated[
        str, _option("check", "Leak check: first, always or never.", _METHOD)
    ] = RunConfig.check,
    model: Annotated[
        str,
        _option("model", "sasrec, gru4rec, din, or din-mean (DIN without attention).", _BACKBONE,
                MODELS),
    ] = RunConfig.model,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss", help="ce (softmax over the catalogue), or on negatives bce, ss (sampled "
            "softmax), bpr, gbce. Default: ce, and bce for DIN.", rich_help_panel=_BACKBONE,
            show_default=False, autocompletion=_among(LOSSES),
        ),
    ] = None,
    gbce_t: Annotated[
        float, _option("gbce_t", "Calibration of --loss gbce, 0 to 1.", _BACKBONE)
    ] = RunConfig.gbce_t,
    tied: Annotated[
        bool,
        typer.Option(
            "--tied/--untied", help="Items are scored by the rows they are read with.",
            rich_help_panel=_BACKBONE,
        ),
    ] = RunConfig.tied,
    norm: Annotated[
        str, _option("norm", "Norms of SASRec: pre, or post as in S3-Rec.", _BACKBONE)
    ] = RunConfig.norm,
    attributes: Annotated[
        str, _option("attributes", "File with categories of the items, for DIN.", _LOG)
    ] = RunConfig.attributes,
    targets: Annotated[
        str,
        _option("targets", "next, or last: one target a user and epoch, for DIN on long "
                "histories.", _BATCHES),
    ] = RunConfig.targets,
    epochs: Annotated[int, _option("epochs", "Most epochs.", _BACKBONE)] = RunConfig.epochs,
    patience: Annotated[
        int,
        _option("patience", "Evaluations without improvement that end it; 0 = never.", _BACKBONE),
    ] = RunConfig.patience,
    stop_on: Annotated[
        str,
        _option("stop_on", "Whose validation decides: overall, or a stratum, as tail.", _BACKBONE),
    ] = RunConfig.stop_on,
    eval_negatives: Annotated[
        int | None,
        typer.Option(
            "--eval-negatives", help="Rank against so many frozen negatives; 0 = the catalogue. "
            "Default: 0, and 100 for DIN.", rich_help_panel=_RUN, show_default=False,
        ),
    ] = None,
    eval_dist: Annotated[
        str, _option("eval_dist", "How they are drawn: uniform or popularity.", _RUN)
    ] = RunConfig.eval_dist,
    eval_every: Annotated[
        int, _option("eval_every", "Epochs between evaluations.", _BACKBONE)
    ] = RunConfig.eval_every,
    batch_size: Annotated[
        int, _option("batch_size", "Users a batch.", _BATCHES)
    ] = RunConfig.batch_size,
    max_events: Annotated[
        int, _option("max_events", "Most events a batch, instead of --batch-size; 0 = off.",
                     _BATCHES)
    ] = RunConfig.max_events,
    mix: Annotated[
        str,
        _option("mix", "Share of the strata in a batch: proportional, uniform, sqrt, 0.5,0.5 or "
                "tail=0.5,head=0.5.", _BATCHES),
    ] = RunConfig.mix,
    weights: Annotated[
        str,
        _option("weights", "population (losses weigh as if users were drawn evenly) or none.",
                _BATCHES),
    ] = RunConfig.weights,
    negatives: Annotated[
        int, _option("negatives", "Negatives, for all losses but ce.", _BATCHES)
    ] = RunConfig.negatives,
    negatives_per: Annotated[
        str, _option("negatives_per", "Negatives are drawn per event, user or batch.", _BATCHES)
    ] = RunConfig.negatives_per,
    negatives_dist: Annotated[
        str, _option("negatives_dist", "uniform or popularity.", _BATCHES)
    ] = RunConfig.negatives_dist,
    negatives_alpha: Annotated[
        float, _option("negatives_alpha", "Exponent of the popularity.", _BATCHES)
    ] = RunConfig.negatives_alpha,
    negatives_exclude: Annotated[
        str, _option("negatives_exclude", "Never an item of the user's training history, of the "
                     "window, of the targets, or none.", _BATCHES)
    ] = RunConfig.negatives_exclude,
    max_len: Annotated[
        int, _option("max_len", "Longest window of events.", _BACKBONE)
    ] = RunConfig.max_len,
    dim: Annotated[int, _option("dim", "Width of the model.", _BACKBONE)] = RunConfig.dim,
    blocks: Annotated[
        int, _option("blocks", "Transformer blocks or GRU layers.", _BACKBONE)
    ] = RunConfig.blocks,
    attention_heads: Annotated[
        int, _option("attention_heads", "Attention heads.", _BACKBONE)
    ] = RunConfig.attention_heads,
    dropout: Annotated[float, _option("dropout", "Dropout.", _BACKBONE)] = RunConfig.dropout,
    lr: Annotated[float, _option("lr", "Learning rate.", _BACKBONE)] = RunConfig.lr,
    heads: Annotated[
        bool | None,
        typer.Option(
            "--heads/--no-heads", help="Train plugin heads on the frozen backbone. Default: yes, "
            "but for --rule joint, the baseline.", rich_help_panel=_HEADS, show_default=False,
        ),
    ] = None,
    head: Annotated[
        str, _option("head", f"Kind of heads: {', '.join(head_names())}.", _HEADS, head_names())
    ] = RunConfig.head,
    head_epochs: Annotated[
        int, _option("head_epochs", "Epochs of the heads.", _HEADS)
    ] = RunConfig.head_epochs,
    head_lr: Annotated[
        float, _option("head_lr", "Learning rate of the heads.", _HEADS)
    ] = RunConfig.head_lr,
    seed: Annotated[int, _option("seed", "Seed of everything random.", _RUN)] = 0,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", help="Several runs one after the other, 0,1,2: folders seed-0, ... in "
            "--out.", rich_help_panel=_RUN,
        ),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config", help="Options from a TOML or JSON file, config.json of a run for example; "
            "options given here go before it.", rich_help_panel=_RUN,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE, a key of config.json; goes before everything else.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Also write events for TensorBoard (extra: tensorboard).",
            rich_help_panel=_RUN,
        ),
    ] = False,
    threads: Annotated[
        int, _option("threads", "Threads of torch; 0 = as torch decides.", _RUN)
    ] = 0,
    log_every: Annotated[
        int, _option("log_every", "Steps between records in log.jsonl.", _RUN)
    ] = RunConfig.log_every,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print metrics.json on stdout.", rich_help_panel=_RUN)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel=_RUN)
    ] = False,
) -> None:  # fmt: skip
    """Train a deconfounded recommender on a log and report by stratum.

    Examples:
        pinet-fast train --data log.parquet --rule agreement --out runs/agreement

        pinet-fast train --data log.csv --rule joint --loss ce --out runs/joint

        pinet-fast train --data log.parquet --model gru4rec --loss bpr --out runs/gru

        pinet-fast train --data log.parquet --model din --attributes items.parquet --out runs/din

        pinet-fast train --config base.toml --set lr=0.003 --seeds 0,1,2 --out runs/three

        pinet-fast train --out runs/joint --resume
    """
    if out is None:
        raise ConfigError("--out: missing; name the run folder to make, as in --out runs/first")
    config = None
    if resume:
        _refuse_changes(context, out)
    else:
        config = resolved(given_options(context), config_file, settings)
    shown = output(as_json=as_json, quiet=quiet)
    if seeds is not None:
        if config is None:
            raise ConfigError("--seeds: each seed has a folder of its own; resume that one")
        runs = seed_runs(config, out, seeds)
    else:
        runs = [(config, out)]
    metrics = [
        run(each, folder, shown, resume=resume, tensorboard=tensorboard) for each, folder in runs
    ]
    if as_json:
        shown.print_json(json.dumps(metrics if seeds is not None else metrics[0]))
        return
    for (_, folder), found in zip(runs, metrics, strict=True):
        summarise(found, RunFolder(folder), shown)


def run(
    config: RunConfig | None,
    out: Path,
    shown: Output,
    *,
    resume: bool = False,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train with progress bars and write the report."""
    with ProgressObserver(shown.err, quiet=shown.quiet) as observer, told(observer.note):
        metrics = run_training(
            config, out, resume=resume, observer=observer, tensorboard=tensorboard
        )
        write_report(RunFiles.load(out), RunFolder(out).report)
    return metrics


def summarise(metrics: dict[str, Any], folder: RunFolder, shown: Output) -> None:
    """Print a run's test metrics by stratum, and where its report is."""
    print_results(metrics, "test", shown)
    shown.out.print(f"report: {folder.report}", highlight=False, soft_wrap=True)


def _refuse_changes(context: typer.Context, out: Path) -> None:
    """A resumed run keeps its options; saying another value for one is a mistake to point out."""
    config = RunConfig.load(RunFolder(out).config).to_dict()
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        wanted = str(value) if name == "data" else value
        if given and name in config and wanted != config[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} {value}: {out} was started with {config[name]!r}, and "
                "a resumed run keeps its options; drop the option, or start a new run"
            )
