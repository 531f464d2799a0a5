"""``pinet-fast train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from pinet_fast.cli import train_options as options
from pinet_fast.cli.console import Output, output
from pinet_fast.cli.progress import ProgressObserver
from pinet_fast.cli.run_options import given_options, resolved, seed_runs
from pinet_fast.cli.run_summary import print_results
from pinet_fast.data.compiling import told
from pinet_fast.errors import ConfigError
from pinet_fast.report import RunFiles, write_report
from pinet_fast.training import RunConfig
from pinet_fast.training import train as run_training
from pinet_fast.training.run_folder import RunFolder


def train(
    context: typer.Context,
    data: options.Data = None,
    out: options.Out = None,
    resume: options.Resume = False,
    user_col: options.UserCol = "user",
    item_col: options.ItemCol = "item",
    time_col: options.TimeCol = "timestamp",
    order: options.Order = "auto",
    rule: options.Rule = RunConfig.rule,
    prior: options.Prior = RunConfig.prior,
    strata: options.Strata = RunConfig.strata,
    check: options.Check = RunConfig.check,
    model: options.Model = RunConfig.model,
    loss: options.Loss = None,
    gbce_t: options.GbceT = RunConfig.gbce_t,
    tied: options.Tied = RunConfig.tied,
    norm: options.Norm = RunConfig.norm,
    attributes: options.Attributes = RunConfig.attributes,
    targets: options.Targets = RunConfig.targets,
    epochs: options.Epochs = RunConfig.epochs,
    patience: options.Patience = RunConfig.patience,
    stop_on: options.StopOn = RunConfig.stop_on,
    eval_negatives: options.EvalNegatives = None,
    eval_dist: options.EvalDist = RunConfig.eval_dist,
    eval_every: options.EvalEvery = RunConfig.eval_every,
    batch_size: options.BatchSize = RunConfig.batch_size,
    max_events: options.MaxEvents = RunConfig.max_events,
    mix: options.Mix = RunConfig.mix,
    weights: options.Weights = RunConfig.weights,
    negatives: options.Negatives = RunConfig.negatives,
    negatives_per: options.NegativesPer = RunConfig.negatives_per,
    negatives_dist: options.NegativesDist = RunConfig.negatives_dist,
    negatives_alpha: options.NegativesAlpha = RunConfig.negatives_alpha,
    negatives_exclude: options.NegativesExclude = RunConfig.negatives_exclude,
    max_len: options.MaxLen = RunConfig.max_len,
    dim: options.Dim = RunConfig.dim,
    blocks: options.Blocks = RunConfig.blocks,
    attention_heads: options.AttentionHeads = RunConfig.attention_heads,
    dropout: options.Dropout = RunConfig.dropout,
    lr: options.Lr = RunConfig.lr,
    heads: options.Heads = None,
    head: options.Head = RunConfig.head,
    head_epochs: options.HeadEpochs = RunConfig.head_epochs,
    head_lr: options.HeadLr = RunConfig.head_lr,
    seed: options.Seed = 0,
    seeds: options.Seeds = None,
    config_file: options.ConfigFile = None,
    settings: options.Settings = None,
    tensorboard: options.Tensorboard = False,
    threads: options.Threads = 0,
    log_every: options.LogEvery = RunConfig.log_every,
    baseline: options.Baseline = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a deconfounded recommender on a log and report by stratum.

    Examples:
        pinet-fast train --data log.parquet --baseline runs/joint --out runs/agreement

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
    baselines = [None if baseline is None else _baseline(baseline, f) for _, f in runs]
    metrics = [
        run(each, folder, shown, resume=resume, tensorboard=tensorboard, baseline=other)
        for (each, folder), other in zip(runs, baselines, strict=True)
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
    baseline: RunFiles | None = None,
) -> dict[str, Any]:
    """Train with progress bars and write the report, against a baseline where one is given."""
    with ProgressObserver(shown.err, quiet=shown.quiet) as observer, told(observer.note):
        metrics = run_training(
            config, out, resume=resume, observer=observer, tensorboard=tensorboard
        )
        trained, report = RunFiles.load(out), RunFolder(out).report
        try:
            write_report(trained, report, baseline)
        except ConfigError as error:
            if baseline is None:
                raise
            observer.note(f"--baseline: {error}; the report was written without it")
            write_report(trained, report)
    return metrics


def _baseline(path: Path, folder: Path) -> RunFiles:
    """Return the run to set another against: of the same seed, where there is one a seed."""
    of_seed = path / folder.name
    return RunFiles.load(of_seed if of_seed.is_dir() else path)


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
