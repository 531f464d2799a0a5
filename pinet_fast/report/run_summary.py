"""What a finished run found, from its metrics.json alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pinet_fast.errors import ConfigError
from pinet_fast.report._json import Node
from pinet_fast.report.schema import (
    STAGES,
    Clicks,
    DataFacts,
    Evaluation,
    StageFacts,
    StratumFacts,
)

SCHEMA = 1
"""The version of the run folder's formats that this package reads."""

_REQUIRED_CONFIG = ("data", "model", "loss", "rule", "seed")


@dataclass(frozen=True)
class RunSummary:
    """A finished run's options, facts and metrics.

    Attributes:
        path: The run folder, or the copy of its metrics.json.
        name: The name the run was given, that of its folder at the time.
        finished_at: ISO time.
        config: The resolved options.
        data: The log.
        strata: The strata, from least to most active.
        stages: Facts of each stage that ran.
        final: The stage whose model the run delivers.
        test: Test metrics of each stage that ran.
        valid: Validation metrics of each stage that ran.
        clicks: Test AUC, GAUC and log loss of each stage where candidates were scored, and of
            ranking by popularity as ``"popularity"``; empty under full ranking.
        coverage: Where each parameter's stratum gradients come from; empty for constant rules.
        versions: Versions of the software.
    """

    path: Path
    name: str
    finished_at: str
    config: dict[str, Any]
    data: DataFacts
    strata: tuple[StratumFacts, ...]
    stages: dict[str, StageFacts]
    final: str
    test: dict[str, Evaluation]
    valid: dict[str, Evaluation]
    clicks: dict[str, Clicks]
    coverage: tuple[str, ...]
    versions: dict[str, str]

    @property
    def num_strata(self) -> int:
        """Return S."""
        return len(self.strata)

    @property
    def group_names(self) -> tuple[str, ...]:
        """Return the names of the evaluated groups: all users first, then the strata."""
        return ("overall", *(stratum.name for stratum in self.strata))

    @property
    def rule(self) -> str:
        """Return the rule, with its prior where that is a choice."""
        rule, prior = str(self.config["rule"]), self.config.get("prior")
        return f"{rule} ({prior} prior)" if rule == "backdoor" and prior else rule

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate a run folder's metrics.json, or a copy of that file.

        Args:
            path: The folder or the file.

        Raises:
            ConfigError: It is not there, is no run, is unfinished, of another schema, or damaged.
        """
        return cls(**cls.fields(Path(path)))

    @classmethod
    def fields(cls, path: Path) -> dict[str, Any]:
        """Return what :meth:`load` makes a run of."""
        top = _metrics(path)
        strata = tuple(StratumFacts.read(node) for node in top["strata"])
        if not strata:
            top["strata"].wrong("one stratum or more")
        ran = [stage for stage in STAGES if not top["stages"].get(stage).is_null]
        final = top["final"]
        if final.text() not in ran:
            final.wrong(f"one of {', '.join(ran)}")
        for key in _REQUIRED_CONFIG:
            top["config"][key]
        parts = {
            part: {stage: Evaluation.read(top[part][stage], len(strata)) for stage in ran}
            for part in ("test", "valid")
        }
        versions = top["versions"]
        return {
            "path": path,
            "name": top["name"].text(),
            "finished_at": top["finished_at"].text(),
            "config": top["config"].mapping(),
            "data": DataFacts.read(top["data"]),
            "strata": strata,
            "stages": {
                stage: StageFacts.read(top["stages"][stage], stage, len(strata)) for stage in ran
            },
            "final": final.text(),
            "test": parts["test"],
            "valid": parts["valid"],
            "clicks": Clicks.read_all(top, ran),
            "coverage": tuple(line.text() for line in top["coverage"]),
            "versions": {name: versions[name].text() for name in versions.mapping()},
        }


def _metrics(path: Path) -> Node:
    if path.is_dir():
        path = _metrics_file(path)
    elif not path.exists():
        raise ConfigError(
            f"{path}: not found; expected a run folder, the --out of a pinet-fast train"
        )
    top = Node(parsed(text_of(path), str(path)), str(path))
    schema = top["schema"].value
    if schema != SCHEMA:
        raise ConfigError(
            f"{path}: expected schema {SCHEMA}, got {schema!r}; read the run with the pinet_fast "
            "that wrote it"
        )
    return top


def _metrics_file(folder: Path) -> Path:
    path = folder / "metrics.json"
    if not path.exists():
        if (folder / "config.json").exists():
            raise ConfigError(
                f"{folder}: the run is not finished (no metrics.json); finish it with: "
                f"pinet-fast train --out {folder} --resume"
            )
        raise ConfigError(
            f"{folder}: expected a run folder with config.json and metrics.json, found neither; "
            "name the --out of a pinet-fast train"
        )
    return path


def text_of(path: Path) -> str:
    """Return a file's text.

    Raises:
        ConfigError: It is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise missing(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore the file") from None


def missing(path: Path) -> ConfigError:
    """Return the error for a file that a finished run lacks."""
    return ConfigError(f"{path}: not found, though the run is finished; copy the whole run folder")


def parsed(text: str, place: str) -> Any:
    """Return the value of JSON text.

    Raises:
        ConfigError: It is none.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ConfigError(
            f"{place}: expected JSON, got something else ({error}); restore the file, or train "
            "the run again"
        ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
