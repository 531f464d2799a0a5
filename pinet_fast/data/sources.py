"""Opens logs of every kind as one thing: names of columns, and record batches one at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from pinet_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson", ".arrow", ".feather")
ROWS = 1 << 16  # a batch; all memory that reading needs is a few of these
Batches = tuple[pa.Schema, "Iterator[tuple[pa.RecordBatch, float]]"]


class Retype(Exception):
    """A text column does not fit the type that was tried: read again with the next one."""


class Source:
    """A log.

    Attributes:
        label: What messages call it, such as ``log events.parquet``.
        name: Short name, kept in the store.
        path: The file or folder; None for a table in memory.
        names: Columns.
        metadata: Of its Arrow schema.
    """

    label: str
    name: str
    path: Path | None
    names: list[str]
    metadata: dict[bytes, bytes]

    def read(self, wanted: dict[str, str]) -> Batches:
        """Return the schema and the batches, each with the share of the log read by then.

        Args:
            wanted: Names of columns by role; no other column is decoded.

        Raises:
            Retype: From here or from the iterator: call again.
            DataError: The log is malformed.
        """
        raise NotImplementedError


def source_of(log: Any) -> Source:
    """Open a path, an Arrow table or reader, or anything with ``__arrow_c_stream__``.

    Raises:
        DataError: It is missing, of an unknown kind, or not readable.
    """
    if isinstance(log, (str, Path)):
        return _file(checked_log_path(log))
    if isinstance(log, pa.RecordBatch):
        log = pa.Table.from_batches([log])
    if isinstance(log, pa.Table):
        return TableSource(log.schema, log.to_reader(max_chunksize=ROWS), log.num_rows)
    if isinstance(log, pa.RecordBatchReader):
        return TableSource(log.schema, log, None)
    if hasattr(log, "__arrow_c_stream__"):
        reader = pa.RecordBatchReader.from_stream(log)
        return TableSource(reader.schema, reader, None)
    raise DataError(
        f"log: expected a path or a table (Arrow, pandas 2.2 or newer, Polars, DuckDB), got "
        f"{type(log).__name__}; give one that has __arrow_c_stream__"
    )


def checked_log_path(path: str | Path) -> Path:
    """Return ``path`` if it is a readable file of a known kind, or a folder of Parquet files.

    Raises:
        DataError: It is missing, empty, of another suffix, or cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        if not parts_of(path):
            raise DataError(
                f"log {path}: expected a file or a folder of .parquet files, got a folder "
                "without any; check the path"
            )
        return path
    if not path.exists():
        raise DataError(f"log {path}: no such file; check the path (it is read from {Path.cwd()})")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"log {path}: expected a name ending in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, "
            f"got {path.suffix!r}; convert the log or rename it"
        )
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(
            f"log {path}: cannot be opened ({error.strerror}); check its permissions"
        ) from error
    return path


def parts_of(path: Path) -> list[Path]:
    """Return the file, or the Parquet files of a folder in order of their names."""
    if not path.is_dir():
        return [path]
    found = (p for p in path.rglob("*.parquet") if p.is_file() and p.name[0] not in "._")
    return sorted(found, key=lambda p: p.relative_to(path).as_posix())


def _file(path: Path) -> Source:
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".parquet":
        return ParquetSource(path)
    if suffix in (".arrow", ".feather"):
        return IpcSource(path)
    from pinet_fast.data._text import TextSource  # which is a Source, and so imports this

    return TextSource(path)


class TableSource(Source):
    """A table in memory, or a stream of batches that can be read once."""

    def __init__(
        self, schema: pa.Schema, reader: pa.RecordBatchReader, num_rows: int | None
    ) -> None:
        self.label, self.name, self.path = "log <table>", "table", None
        self.names = list(schema.names)
        self.metadata = dict(schema.metadata or {})
        self._schema, self._reader, self._num_rows = schema, reader, num_rows

    def read(self, wanted: dict[str, str]) -> Batches:
        """Return the batches."""
        schema = pa.schema([self._schema.field(name) for name in wanted.values()])
        return schema, self._batches(schema.names)

    def _batches(self, names: list[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
        done = 0
        try:
            for batch in self._reader:
                done += batch.num_rows
                yield batch.select(names), done / self._num_rows if self._num_rows else 0.0
        except pa.ArrowException as error:
            raise DataError(
                f"{self.label}: its stream broke off ({said(error)}); give the table again"
            ) from error


class ParquetSource(Source):
    """A Parquet file, or a folder of them with the same columns."""

    def __init__(self, path: Path) -> None:
        # A folder may be ".", which has no name of its own.
        self.label, self.name, self.path = f"log {path}", Path(os.path.abspath(path)).name, path
        self._parts = parts_of(path)
        self._sizes = []
        for part in self._parts:
            try:
                with pyarrow.parquet.ParquetFile(part) as file:
                    self._sizes.append(file.metadata.num_rows)
                    if part == self._parts[0]:
                        self._schema = file.schema_arrow
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(part, error, "Parquet") from error
        self.names = list(self._schema.names)
        self.metadata = dict(self._schema.metadata or {})

    def read(self, wanted: dict[str, str]) -> Batches:
        """Return the batches of all files, one file after the other."""
        schema = pa.schema([self._schema.field(name) for name in wanted.values()])
        return schema, self._batches(schema)

    def _batches(self, schema: pa.Schema) -> Iterator[tuple[pa.RecordBatch, float]]:
        done, total = 0, max(1, sum(self._sizes))
        for part in self._parts:
            try:
                # Not pyarrow.parquet.read_table: it would take a folder name such as day=1 for a
                # column.
                with pyarrow.parquet.ParquetFile(part) as file:
                    _check_same(part, self._parts[0], schema, file.schema_arrow)
                    for batch in file.iter_batches(ROWS, columns=schema.names):
                        done += batch.num_rows
                        yield batch.select(schema.names), done / total
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(part, error, "Parquet") from error


class IpcSource(Source):
    """An Arrow IPC file or stream, also called Feather."""

    def __init__(self, path: Path) -> None:
        self.label, self.name, self.path = f"log {path}", path.name, path
        try:
            self._map = pa.memory_map(str(path))
            try:
                self._file: Any = pa.ipc.open_file(self._map)
                self._num_batches = self._file.num_record_batches
            except pa.ArrowInvalid:
                self._map.seek(0)
                self._file, self._num_batches = pa.ipc.open_stream(self._map), None
            self._schema = self._file.schema
            self.names = list(self._schema.names)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error, "Arrow IPC") from error
        self.metadata = dict(self._schema.metadata or {})

    def read(self, wanted: dict[str, str]) -> Batches:
        """Return the batches of the file."""
        schema = pa.schema([self._schema.field(name) for name in wanted.values()])
        return schema, self._batches(schema.names)

    def _batches(self, names: list[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
        count = self._num_batches
        stored = iter(self._file) if count is None else map(self._file.get_batch, range(count))
        try:
            for number, batch in enumerate(stored, 1):
                batch.validate(full=True)
                for start in range(0, batch.num_rows, ROWS):
                    share = number / count if count else 0.0
                    yield batch.select(names).slice(start, ROWS), share
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(Path(self.label[4:]), error, "Arrow IPC") from error


def _check_same(part: Path, first: Path, want: pa.Schema, got: pa.Schema) -> None:
    for field in want:
        index = got.get_field_index(field.name)
        kind = None if index < 0 else got.field(index).type
        if kind != field.type:
            raise DataError(
                f"log {part}: expected column {field.name!r} of type {field.type} as in "
                f"{first.name}, got {kind or 'no such column'}; write all files with one schema"
            )


def _unreadable(path: Path, error: Exception, kind: str) -> DataError:
    return DataError(
        f"log {path}: not a whole {kind} file ({said(error)}); write or download it again"
    )


def said(error: Exception) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split())[:200]
