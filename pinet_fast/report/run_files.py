"""Reads the folder that a finished training run left."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from pinet_fast.errors import ConfigError
from pinet_fast.report._json import Node
from pinet_fast.report.run_summary import RunSummary, missing, parsed, text_of
from pinet_fast.report.schema import STAGES, EpochRecord, IntArray, Ranks, StepRecord

_BAD_ZIP = (zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class RunFiles(RunSummary):
    """A finished run with all that its folder holds.

    Attributes:
        steps: Logged steps.
        epochs: Ends of epochs.
        ranks: Test ranks of every user.
    """

    steps: tuple[StepRecord, ...]
    epochs: tuple[EpochRecord, ...]
    ranks: Ranks

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate a run folder.

        Args:
            path: The folder.

        Raises:
            ConfigError: It is not there, is no run folder, is unfinished, of another schema, or
                damaged. A log that breaks off in its last line is read up to there.
        """
        folder = Path(path)
        if folder.is_file():
            raise ConfigError(
                f"{folder}: is a file; expected a run folder, the --out of a pinet-fast train"
            )
        found = cls.fields(folder)
        num_strata = len(found["strata"])
        steps, epochs = _log(folder / "log.jsonl", num_strata)
        ranks = _ranks(folder / "test_ranks.npz", list(found["stages"]), num_strata)
        return cls(**found, steps=steps, epochs=epochs, ranks=ranks)


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
    lines = text_of(path).splitlines()
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        try:
            nodes.append(Node(parsed(line, place), place))
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
        raise missing(path) from None
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
