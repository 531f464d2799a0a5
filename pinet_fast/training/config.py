"""The resolved options of a run."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_type_hints

from pinet_fast.aggregation.rules import Backdoor, Rule, by_name
from pinet_fast.aggregation.rules import names as rule_names
from pinet_fast.errors import ConfigError
from pinet_fast.heads import head_names
from pinet_fast.models.losses import LOSSES
from pinet_fast.training.mixes import mix_of

if TYPE_CHECKING:
    from pathlib import Path

MODELS = ("sasrec", "gru4rec", "din", "din-mean")
CANDIDATE_MODELS = ("din", "din-mean")
"""Models that score candidates one by one: they are never ranked against the catalogue."""

PRIORS = ("uniform", "users", "events")
_NEGATIVES = {
    "negatives_per": ("event", "user", "batch"),
    "negatives_dist": ("uniform", "popularity"),
    "negatives_exclude": ("history", "window", "targets", "none", "sequence"),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run besides the log itself.

    Attributes:
        data: Path of the log, Parquet or CSV.
        model: The backbone: ``sasrec``, ``gru4rec``, ``din``, or ``din-mean``, DIN with the plain
            mean of the history in place of its attention.
        loss: ``ce`` (softmax over the catalogue), or on sampled negatives ``bce``, ``ss`` (softmax
            with log-q correction), ``bpr`` or ``gbce``. DIN has ``bce`` alone.
        gbce_t: Calibration of ``gbce``, 0 to 1.
        tied: Whether items are scored by the rows they are read with, in sequence models.
        norm: Norms of SASRec: ``pre``, or ``post`` as in S3-Rec.
        attributes: File with categories of the items, for DIN; empty for none.
        targets: ``next``: every event of a window is predicted; ``last``: the last one of a prefix
            of random length, a user and epoch, for DIN on long histories.
        rule: How stratum gradients are aggregated: ``joint``, ``backdoor`` or ``agreement``.
        prior: P(z) of the backdoor rule: ``uniform``, ``users`` or ``events``.
        strata: How users are cut by activeness, such as ``head:0.2``.
        heads: Whether plugin heads are trained on the frozen backbone.
        head: The kind of heads, a name of ``pinet_fast.heads``.
        seed: Seed of the weights, of dropout, of the order of users and of negatives.
        epochs: Most epochs of stage 1.
        patience: Evaluations without a better validation score after which stage 1 ends; 0 =
            never.
        stop_on: Whose validation score that is, and decides which epoch is kept: ``overall``, or
            the name of a stratum, such as ``tail`` or ``head``.
        eval_negatives: Frozen negatives that each held-out item is ranked against; 0 = the whole
            catalogue. Their seed is 0 whatever the run's, so that runs are comparable.
        eval_dist: How they are drawn: ``uniform`` or ``popularity``.
        eval_every: Epochs between evaluations on the validation events.
        head_epochs: Epochs of stage 2.
        batch_size: Users a batch; without effect where ``max_events`` is given.
        max_events: Most events a batch; 0 = no limit but ``batch_size``.
        mix: Share of every stratum in a batch: ``proportional``, ``uniform``, ``sqrt``, or shares
            with the sum 1, ``0.5,0.5`` or by name or number, ``tail=0.5,head=0.5``.
        weights: ``population``: losses weigh as if users were drawn evenly, whatever the mix;
            ``none``: as they were drawn. Rules that look at single strata are the same with both.
        negatives: Negatives of an event, user or batch, with ``--loss bce``.
        negatives_per: ``event``, ``user`` or ``batch``.
        negatives_dist: ``uniform`` or ``popularity``.
        negatives_alpha: Exponent of the popularity.
        negatives_exclude: What negatives never are: items of the user's training ``history``, of
            the ``window`` shown, the ``targets``, or ``none``; or of the whole ``sequence``,
            held-out items too, as some published figures had it.
        max_len: Longest window of events.
        dim: d of the model.
        blocks: Transformer blocks, or GRU layers.
        attention_heads: Attention heads.
        dropout: Dropout of the backbone.
        lr: Learning rate of Adam in stage 1.
        head_lr: Learning rate of Adam in stage 2.
        check: Leak check: ``first``, ``always`` or ``never``.
        user_col: Column of user ids.
        item_col: Column of item ids.
        time_col: Column of timestamps.
        order: ``auto``, ``timestamp`` or ``rows``.
        log_every: Steps between step records in log.jsonl.
        threads: Threads of torch; 0 = as torch decides.
    """

    data: str
    model: str = "sasrec"
    loss: str = "ce"
    gbce_t: float = 0.75
    tied: bool = True
    norm: str = "pre"
    attributes: str = ""
    targets: str = "next"
    rule: str = "backdoor"
    prior: str = "uniform"
    strata: str = "head:0.2"
    heads: bool = True
    head: str = "plugin"
    seed: int = 0
    epochs: int = 40
    patience: int = 5
    stop_on: str = "overall"
    eval_every: int = 1
    eval_negatives: int = 0
    eval_dist: str = "uniform"
    head_epochs: int = 5
    batch_size: int = 128
    max_events: int = 0
    mix: str = "proportional"
    weights: str = "population"
    negatives: int = 1
    negatives_per: str = "event"
    negatives_dist: str = "uniform"
    negatives_alpha: float = 1.0
    negatives_exclude: str = "history"
    max_len: int = 50
    dim: int = 64
    blocks: int = 2
    attention_heads: int = 1
    dropout: float = 0.5
    lr: float = 1e-3
    head_lr: float = 1e-3
    check: str = "first"
    user_col: str = "user"
    item_col: str = "item"
    time_col: str = "timestamp"
    order: str = "auto"
    log_every: int = 20
    threads: int = 0

    def __post_init__(self) -> None:
        _one_of("model", self.model, MODELS)
        _one_of("loss", self.loss, LOSSES)
        _one_of("rule", self.rule, rule_names())
        _one_of("prior", self.prior, PRIORS)
        _one_of("order", self.order, ("auto", "timestamp", "rows"))
        _one_of("check", self.check, ("first", "always", "never"))
        _one_of("weights", self.weights, ("population", "none"))
        _one_of("norm", self.norm, ("pre", "post"))
        _one_of("targets", self.targets, ("next", "last"))
        _one_of("head", self.head, head_names())
        _one_of("eval_dist", self.eval_dist, ("uniform", "popularity"))
        mix_of(self.mix)
        self._check_model()
        self._check_negatives()
        for name in ("epochs", "eval_every", "batch_size", "max_len", "dim", "blocks"):
            _at_least(name, getattr(self, name), 1)
        for name in ("attention_heads", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("seed", "patience", "head_epochs", "threads", "max_events", "eval_negatives"):
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            if not (0 < value < math.inf):
                raise ConfigError(f"--{_option(name)}: expected a number above 0, got {value}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout: expected 0 <= dropout < 1, got {self.dropout}")
        if self.dim % self.attention_heads:
            raise ConfigError(
                f"--attention-heads: {self.attention_heads} does not divide --dim {self.dim}"
            )
        if self.prior != "uniform" and self.rule != "backdoor":
            raise ConfigError(
                f"--prior {self.prior}: only --rule backdoor has a prior, the rule is {self.rule}"
            )

    def _check_model(self) -> None:
        is_candidate = self.model in CANDIDATE_MODELS
        if is_candidate and self.loss != "bce":
            raise ConfigError(f"--loss {self.loss}: --model {self.model} is trained with bce only")
        if is_candidate and self.eval_negatives < 1:
            raise ConfigError(
                f"--eval-negatives {self.eval_negatives}: --model {self.model} scores candidates, "
                "so give it some, as in --eval-negatives 100"
            )
        for name, only, value, default in (
            ("attributes", CANDIDATE_MODELS, self.attributes, ""),
            ("targets", CANDIDATE_MODELS, self.targets, "next"),
            ("norm", ("sasrec",), self.norm, "pre"),
            ("tied", ("sasrec", "gru4rec"), self.tied, True),
        ):
            if value != default and self.model not in only:
                raise ConfigError(
                    f"--{name} {value}: only --model {' or '.join(only)} has that option, the "
                    f"model is {self.model}"
                )
        if not 0 <= self.gbce_t <= 1:
            raise ConfigError(f"--gbce-t: expected 0 <= t <= 1, got {self.gbce_t}")
        if self.gbce_t != 0.75 and self.loss != "gbce":
            raise ConfigError(
                f"--gbce-t {self.gbce_t}: only --loss gbce has it, the loss is {self.loss}"
            )
        if self.eval_dist != "uniform" and not self.eval_negatives:
            raise ConfigError(
                f"--eval-dist {self.eval_dist}: the whole catalogue is ranked; give "
                "--eval-negatives too"
            )

    def _check_negatives(self) -> None:
        for name, known in _NEGATIVES.items():
            _one_of(name, getattr(self, name), known)
        _at_least("negatives", self.negatives, 1)
        if not math.isfinite(self.negatives_alpha):
            raise ConfigError(
                f"--negatives-alpha: expected a finite number, got {self.negatives_alpha}"
            )
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ("negatives", *_NEGATIVES, "negatives_alpha"):
            if self.loss == "ce" and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"--{_option(name)} {getattr(self, name)}: --loss ce draws no negatives; take "
                    f"{', '.join(loss for loss in LOSSES if loss != 'ce')}"
                )
        if self.negatives_dist == "uniform" and self.negatives_alpha != 1:
            raise ConfigError(
                f"--negatives-alpha {self.negatives_alpha}: only --negatives-dist popularity has "
                "an exponent"
            )

    def make_rule(self) -> Rule:
        """Return the rule object."""
        return Backdoor(self.prior) if self.rule == "backdoor" else by_name(self.rule)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Build a config from JSON values.

        Raises:
            ConfigError: Unknown keys (with the nearest known one), wrong types, bad values.
        """
        types = get_type_hints(cls)
        for key, value in values.items():
            if key not in types:
                near = get_close_matches(key, types, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"config: unknown key {key!r}{hint}")
            accepted = (int, float) if types[key] is float else (types[key],)
            is_bool = isinstance(value, bool)
            if not isinstance(value, accepted) or (is_bool and types[key] is not bool):
                raise ConfigError(
                    f"config: {key} must be of type {types[key].__name__}, got {value!r}"
                )
        if "data" not in values:
            raise ConfigError("config: the key 'data' is missing")
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Read a config.json.

        Raises:
            ConfigError: Missing or damaged file, or bad values in it.
        """
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: not found, so {path.parent} is no run folder; start one without --resume"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def _option(name: str) -> str:
    return name.replace("_", "-")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = get_close_matches(value, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"--{_option(name)}: expected one of {', '.join(known)}; got {value!r}{hint}"
        )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"--{_option(name)}: expected a number >= {least}, got {value}")
