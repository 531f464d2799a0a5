"""Options of ``pinet-fast train``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pinet_fast.aggregation.rules import names as rule_names
from pinet_fast.heads import head_names
from pinet_fast.models.losses import LOSSES
from pinet_fast.training.config import MODELS

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


Data = Annotated[
    Path | None,
    typer.Option("--data", help="The log: Parquet or CSV.", rich_help_panel=_LOG),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Run folder to make.", rich_help_panel=_RUN),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the checkpoint in --out, with the options it was started with.",
        rich_help_panel=_RUN,
    ),
]
UserCol = Annotated[str, _option("user_col", "Column of user ids.", _LOG)]
ItemCol = Annotated[str, _option("item_col", "Column of item ids.", _LOG)]
TimeCol = Annotated[str, _option("time_col", "Column of timestamps.", _LOG)]
Order = Annotated[
    str, _option("order", "auto (timestamps where there are any), timestamp, rows.", _LOG)
]
Rule = Annotated[str, _option("rule", f"One of {', '.join(rule_names())}.", _METHOD, rule_names())]
Prior = Annotated[
    str, _option("prior", "P(z) of --rule backdoor: uniform, users or events.", _METHOD)
]
Strata = Annotated[
    str,
    _option("strata", "Strata by activeness: head:0.2, quantile:5 or 5,20,100.", _METHOD),
]
Check = Annotated[str, _option("check", "Leak check: first, always or never.", _METHOD)]
Model = Annotated[
    str,
    _option(
        "model", "sasrec, gru4rec, din, or din-mean (DIN without attention).", _BACKBONE, MODELS
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        help="ce (softmax over the catalogue), or on negatives bce, ss (sampled "
        "softmax), bpr, gbce. Default: ce, and bce for DIN.",
        rich_help_panel=_BACKBONE,
        show_default=False,
        autocompletion=_among(LOSSES),
    ),
]
GbceT = Annotated[float, _option("gbce_t", "Calibration of --loss gbce, 0 to 1.", _BACKBONE)]
Tied = Annotated[
    bool,
    typer.Option(
        "--tied/--untied",
        help="Items are scored by the rows they are read with.",
        rich_help_panel=_BACKBONE,
    ),
]
Norm = Annotated[str, _option("norm", "Norms of SASRec: pre, or post as in S3-Rec.", _BACKBONE)]
Attributes = Annotated[
    str, _option("attributes", "File with categories of the items, for DIN.", _LOG)
]
Targets = Annotated[
    str,
    _option(
        "targets",
        "next, or last: one target a user and epoch, for DIN on long histories.",
        _BATCHES,
    ),
]
Epochs = Annotated[int, _option("epochs", "Most epochs.", _BACKBONE)]
Patience = Annotated[
    int,
    _option("patience", "Evaluations without improvement that end it; 0 = never.", _BACKBONE),
]
StopOn = Annotated[
    str,
    _option("stop_on", "Whose validation decides: overall, or a stratum, as tail.", _BACKBONE),
]
EvalNegatives = Annotated[
    int | None,
    typer.Option(
        "--eval-negatives",
        help="Rank against so many frozen negatives; 0 = the catalogue. "
        "Default: 0, and 100 for DIN.",
        rich_help_panel=_RUN,
        show_default=False,
    ),
]
EvalDist = Annotated[str, _option("eval_dist", "How they are drawn: uniform or popularity.", _RUN)]
EvalEvery = Annotated[int, _option("eval_every", "Epochs between evaluations.", _BACKBONE)]
BatchSize = Annotated[int, _option("batch_size", "Users a batch.", _BATCHES)]
MaxEvents = Annotated[
    int, _option("max_events", "Most events a batch, instead of --batch-size; 0 = off.", _BATCHES)
]
Mix = Annotated[
    str,
    _option(
        "mix",
        "Share of the strata in a batch: proportional, uniform, sqrt, 0.5,0.5 or "
        "tail=0.5,head=0.5.",
        _BATCHES,
    ),
]
Weights = Annotated[
    str,
    _option(
        "weights", "population (losses weigh as if users were drawn evenly) or none.", _BATCHES
    ),
]
Negatives = Annotated[int, _option("negatives", "Negatives, for all losses but ce.", _BATCHES)]
NegativesPer = Annotated[
    str, _option("negatives_per", "Negatives are drawn per event, user or batch.", _BATCHES)
]
NegativesDist = Annotated[str, _option("negatives_dist", "uniform or popularity.", _BATCHES)]
NegativesAlpha = Annotated[
    float, _option("negatives_alpha", "Exponent of the popularity.", _BATCHES)
]
NegativesExclude = Annotated[
    str,
    _option(
        "negatives_exclude",
        "Never an item of the user's training history, of the window, of the targets, or none; or"
        " of the whole sequence, held-out items too.",
        _BATCHES,
    ),
]
MaxLen = Annotated[int, _option("max_len", "Longest window of events.", _BACKBONE)]
Dim = Annotated[int, _option("dim", "Width of the model.", _BACKBONE)]
Blocks = Annotated[int, _option("blocks", "Transformer blocks or GRU layers.", _BACKBONE)]
AttentionHeads = Annotated[int, _option("attention_heads", "Attention heads.", _BACKBONE)]
Dropout = Annotated[float, _option("dropout", "Dropout.", _BACKBONE)]
Lr = Annotated[float, _option("lr", "Learning rate.", _BACKBONE)]
Heads = Annotated[
    bool | None,
    typer.Option(
        "--heads/--no-heads",
        help="Train plugin heads on the frozen backbone. Default: yes, "
        "but for --rule joint, the baseline.",
        rich_help_panel=_HEADS,
        show_default=False,
    ),
]
Head = Annotated[
    str, _option("head", f"Kind of heads: {', '.join(head_names())}.", _HEADS, head_names())
]
HeadEpochs = Annotated[int, _option("head_epochs", "Epochs of the heads.", _HEADS)]
HeadLr = Annotated[float, _option("head_lr", "Learning rate of the heads.", _HEADS)]
Seed = Annotated[int, _option("seed", "Seed of everything random.", _RUN)]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        help="Several runs one after the other, 0,1,2: folders seed-0, ... in --out.",
        rich_help_panel=_RUN,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Options from a TOML or JSON file, config.json of a run for example; "
        "options given here go before it.",
        rich_help_panel=_RUN,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY=VALUE, a key of config.json; goes before everything else.",
        rich_help_panel=_RUN,
    ),
]
Tensorboard = Annotated[
    bool,
    typer.Option(
        "--tensorboard",
        help="Also write events for TensorBoard (extra: tensorboard).",
        rich_help_panel=_RUN,
    ),
]
Threads = Annotated[int, _option("threads", "Threads of torch; 0 = as torch decides.", _RUN)]
LogEvery = Annotated[int, _option("log_every", "Steps between records in log.jsonl.", _RUN)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print metrics.json on stdout.", rich_help_panel=_RUN)
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        help="Finished run, such as the joint one, against which report.html sets this one; with "
        "--seeds also the folder of its seeds.",
        rich_help_panel=_RUN,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel=_RUN)
]
