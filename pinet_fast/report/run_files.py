"""Reads the folder that a finished training run left."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pinet_fast.errors import ConfigError
from pinet_fast.report._json import Node
from pinet_fast.report.schema import (
    STAGES,
    DataFacts,
    EpochRecord,
    Evaluation,
    IntArray,
    Ranks,
    StageFacts,
    StepRecord,
    StratumFacts,
)

SCHEMA = 1
"""The version of the run folder's formats that this package reads."""

_BAD_ZIP = (zipfile.BadZipFile, zlib.error)

_REQUIRED_CONFIG = ("data", "model", "loss", "rule", "seed")


@dataclass(frozen=True)
class RunFiles:
    """A finished run.

    Attributes:
        path: The run folder.
        name: The name the run was given, that of its folder at the time.
        finished_at: ISO time.
        config: The resolved options.
        data: The log.
        strata: The strata, from least to most active.
        stages: Facts of each stage that ran.
        final: The stage whose model the run delivers.
        test: Test metrics of each stage that ran.
        valid: Validation metrics of each stage that ran.
        coverage: Where each parameter's stratum gradients come from; empty for constant rules.
        versions: Versions of the software.
        steps: Logged steps.
        epochs: Ends of epochs.
        ranks: Test ranks of every user.
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
    coverage: tuple[str, ...]
    versions: dict[str, str]
    steps: tuple[StepRecord, ...]
    epochs: tuple[EpochRecord, ...]
    ranks: Ranks

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
    def load(cls, path: str | Path) -> RunFiles:
        """Read and validate a run folder.

        Args:
            path: The folder.

        Raises:
            ConfigError: It is not there, is no run folder, is unfinished, of another schema, or
                damaged. A log that breaks off in its last line is read up to there.
        """
        folder = Path(path)
        top = _metrics(folder)
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
        steps, epochs = _log(folder / "log.jsonl", len(strata))
        versions = top["versions"]
        return cls(
            path=folder,
            name=top["name"].text(),
            finished_at=top["finished_at"].text(),
            config=top["config"].mapping(),
            data=DataFacts.read(top["data"]),
            strata=strata,
            stages={
                stage: StageFacts.read(top["stages"][stage], stage, len(strata)) for stage in ran
            },
            final=final.text(),
            test=parts["test"],
            valid=parts["valid"],
            coverage=tuple(line.text() for line in top["coverage"]),
            versions={name: versions[name].text() for name in versions.mapping()},
            steps=steps,
            epochs=epochs,
            ranks=_ranks(folder / "test_ranks.npz", ran, len(strata)),
        )


def _metrics(folder: Path) -> Node:
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "not found"
        raise ConfigError(
            f"{folder}: {kind}; expected a run folder, the --out of a pinet-fast train"
        )
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
    top = Node(_parsed(_text(path), str(path)), str(path))
    schema = top["schema"].value
    if schema != SCHEMA:
        raise ConfigError(
            f"{path}: expected schema {SCHEMA}, got {schema!r}; read the run with the pinet_fast "
            "that wrote it"
        )
    return top


def _log(path: Path, num_strata: int) -> tuple[tuple[StepRecord, ...], tuple[EpochRecord, ...]]:
    steps: list[StepRecord] = []
    epochs: list[EpochRecord] = []
    nodes = _log_nodes(path)
    offset = _heads_offset(nodes)
    for node in nodes:
        stage, event = node["stage"], node["event"]
        if stage.text() not in STAGES:
            stage.wrong(f"one of {', '.join(STAGES)}")
        shift = offset if stage.text() == "heads" else 0
        if event.text() == "step":
            steps.append(StepRecord.read(node, num_strata, shift))
        elif event.text() == "epoch":
            epochs.append(EpochRecord.read(node, num_strata, shift))
        else:
            event.wrong("step or epoch")
    return tuple(steps), tuple(epochs)


def _log_nodes(path: Path) -> list[Node]:
    nodes = []
    lines = _text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        try:
            nodes.append(Node(_parsed(line, place), place))
        except ConfigError:
            if number < len(lines):  # a crash may cut the line being written, and only that one
                raise
    return nodes


def _heads_offset(nodes: list[Node]) -> int:
    """Return what makes the steps of the heads stage count on from those of the backbone."""
    steps: dict[str, list[int]] = {stage: [] for stage in STAGES}
    for node in nodes:
        steps.setdefault(node["stage"].text(), []).append(node["step"].integer())
    last = max(steps["backbone"], default=0)
    return last if min(steps["heads"], default=last + 1) <= last else 0


def _ranks(path: Path, stages: list[str], num_strata: int) -> Ranks:
    names = ("users", "strata", "activeness", *stages)
    try:
        # Opened here: np.load leaves a file that it cannot read open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays: dict[str, IntArray] = {name: file[name] for name in names}
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, *_BAD_ZIP) as error:
        raise ConfigError(
            f"{path}: cannot be read as arrays {', '.join(names)} ({type(error).__name__}); "
            "restore the file, or train the run again"
        ) from None
    shape = (len(arrays["users"]) if arrays["users"].ndim else 0,)
    for name, array in arrays.items():
        least = 1 if name in stages else 0
        kinds = "iuU" if name == "users" else "iu"  # ids of users may be strings
        bad = array.shape != shape or array.dtype.kind not in kinds
        bounded = name != "users" and not bad and array.size > 0
        if bad or (bounded and array.min() < least):
            raise ConfigError(
                f"{path}: {name}: expected whole numbers >= {least} of shape {shape}, got "
                f"{array.dtype} of shape {array.shape}; restore the file, or train the run again"
            )
    if arrays["strata"].size and int(arrays["strata"].max()) >= num_strata:
        raise ConfigError(
            f"{path}: strata: expected ids below {num_strata}, got {int(arrays['strata'].max())}; "
            "it belongs to another run: restore the folder's own file"
        )
    by_stage = {stage: arrays[stage] for stage in stages}
    return Ranks(arrays["users"], arrays["strata"], arrays["activeness"], by_stage)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore the file") from None


def _missing(path: Path) -> ConfigError:
    return ConfigError(f"{path}: not found, though the run is finished; copy the whole run folder")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ConfigError(
            f"{place}: expected JSON, got something else ({error}); restore the file, or train "
            "the run again"
        ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
