"""Fingerprints of logs: of what files hold, and of what tables hold."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pinet_fast.data.ids import StringIds
from pinet_fast.data.sources import parts_of

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt


class TableHash:
    """Content of a table, however its rows are cut into batches."""

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        """Add the next rows."""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_large_string(column.type):
                ends, data = StringIds(column).buffers()
                self._add(f"{name}.lengths", np.diff(ends))
                self._add(name, data)
            else:
                self._add(f"{name}.{column.type}", column.to_numpy())

    def _add(self, name: str, data: npt.NDArray[Any]) -> None:
        part = self._parts.setdefault(name, hashlib.sha256())
        part.update(np.ascontiguousarray(data).view(np.uint8).data)

    def digest(self) -> Any:
        """Return a hash of all columns."""
        parts = {name: part.hexdigest() for name, part in self._parts.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode())


def state_of(path: Path) -> list[tuple[str, int, int, int]]:
    """Return what changes when a file or folder does: names, inodes, sizes, times."""
    states = [(part, part.stat()) for part in parts_of(path)]
    return [(str(p), s.st_ino, s.st_size, s.st_mtime_ns) for p, s in states]


def file_digest(path: Path) -> Any:
    """Return a SHA-256 of what a file, or the files of a folder, hold."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256")
    whole = hashlib.sha256()
    for part in parts_of(path):
        whole.update(part.relative_to(path).as_posix().encode() + b"\0")
        with part.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole
