"""The run folder: what a run leaves, written so that nothing is ever half there."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pinet_fast._atomic import replacing
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from pinet_fast.training.config import RunConfig
    from pinet_fast.training.tensorboard import TensorBoardLog


class RunFolder:
    """Paths and writers of one run; as a context manager it lets go of its claim at the end.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.log = path / "log.jsonl"
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.json"
        self.metrics_csv = path / "metrics.csv"
        self.ranks = path / "test_ranks.npz"
        self.report = path / "report.html"
        self.events = path / "tensorboard"
        self._claim: int | None = None

    def claim(self) -> None:
        """Keep other runs out of the folder, for as long as this process at most.

        Raises:
            ConfigError: Another run has claimed it.
        """
        self._claim = _locked(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    @contextlib.contextmanager
    def creating(self) -> Iterator[None]:
        """Make and claim the folder for a new run; a failure inside leaves no trace of it.

        Raises:
            ConfigError: The folder cannot be made or holds something already.
        """
        if self.checkpoint.exists():
            raise ConfigError(
                f"--out {self.path}: holds a run already; continue it with --resume, or choose "
                "another folder"
            )
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(f"--out {self.path}: the folder is not empty; choose another one")
        first_made = _first_missing(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            _remove(first_made)
            raise ConfigError(
                f"--out {self.path}: cannot write there ({error.strerror}); choose a folder in "
                "which you may write"
            ) from None
        self.claim()  # where it fails the folder is another's
        try:
            yield
        except BaseException:
            # A run that reached its first checkpoint can be resumed, so it stays.
            if not self.checkpoint.exists():
                _remove(first_made)
            raise

    def write_config(self, config: RunConfig) -> None:
        """Write config.json."""
        replace_file(self.config, _json(config.to_dict()))

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json and metrics.csv."""
        replace_file(self.metrics_csv, _csv(metrics))
        replace_file(self.metrics, _json(metrics))

    def write_ranks(self, **arrays: np.ndarray[Any, Any]) -> None:
        """Write test_ranks.npz: the rank of every user's target."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        replace_file(self.ranks, buffer.getvalue())


class RunLog:
    """Appends records to log.jsonl; a resumed run drops what came after its checkpoint.

    Args:
        path: The file.
        keep: Bytes to keep of an existing file.
        also: Written to as well, and closed with it.
    """

    def __init__(self, path: Path, keep: int = 0, also: TensorBoardLog | None = None) -> None:
        mode = "r+b" if path.exists() else "w+b"
        self._file = path.open(mode)
        self._also = also
        self._file.truncate(keep)
        self._file.seek(keep)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(_finite(record)).encode() + b"\n")
        if self._also is not None:
            self._also.write(record)

    def size(self) -> int:
        """Flush, and return the bytes written so far."""
        self._file.flush()
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._also is not None:
            self._also.close()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as file:
        file.write(content)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(_finite(value), indent=2) + "\n").encode()


def _finite(value: Any) -> Any:
    """JSON has no NaN: write null for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _csv(metrics: dict[str, Any]) -> bytes:
    """Return one row a part, stage, group and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["part", "stage", "group", "users", "metric", "mean", "low", "high"])
    names = [stratum["name"] for stratum in metrics["strata"]]
    for part in ("valid", "test"):
        for stage, evaluation in metrics[part].items():
            if evaluation is None:
                continue
            groups = [("overall", evaluation["overall"])]
            groups += list(zip(names, evaluation["strata"], strict=True))
            for name, group in groups:
                for metric, value in group.items():
                    if metric != "users":
                        row = [value["mean"], value["low"], value["high"]]
                        writer.writerow([part, stage, name, group["users"], metric, *row])
    return out.getvalue().encode()


def _locked(path: Path) -> int | None:
    """Return a descriptor that holds the lock of a folder, or None where there is none to have."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # who reads the folder says what is wrong with it
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"--out {path}: another run is training into this folder; wait until it has ended, "
            "stop it, or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _first_missing(path: Path) -> Path | None:
    """Return the outermost folder that ``mkdir -p path`` would make, or None."""
    missing = None
    for folder in (path, *path.parents):
        if folder.exists():
            break
        missing = folder
    return missing


def _remove(path: Path | None) -> None:
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
