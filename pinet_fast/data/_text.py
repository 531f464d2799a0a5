"""Logs that are text: CSV with a header, JSON with one object a line."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from pinet_fast.data.sources import Batches, Retype, Source, said
from pinet_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BLOCK_BYTES = 8 << 20
_NAMES_BYTES = 1 << 20
# Text files have no types: the first that every value fits, found by trying.
_STAMPS = (
    pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("ns"),
    pa.timestamp("us", "UTC"), pa.timestamp("ns", "UTC"), pa.string(),
)  # fmt: skip
_CSV_IDS = (pa.int64(), pa.uint64(), pa.float64(), pa.string())
_CSV_TYPES = {
    "user": _CSV_IDS, "item": _CSV_IDS, "time": (pa.int64(), pa.float64(), pa.date32(), *_STAMPS),
}  # fmt: skip
_JSON_IDS = (pa.int64(), pa.string())
_JSON_TYPES = {"user": _JSON_IDS, "item": _JSON_IDS, "time": (pa.int64(), pa.float64(), *_STAMPS)}


class TextSource(Source):
    """A CSV file with a header, or JSON with one object a line."""

    def __init__(self, path: Path) -> None:
        self.label, self.name, self.path = f"log {path}", path.name, path
        self.is_csv = path.suffix.lower() == ".csv"
        self.metadata: dict[bytes, bytes] = {}
        self._file_path = path
        self._known = _CSV_TYPES if self.is_csv else _JSON_TYPES
        self._types: dict[str, int] = {}
        try:
            self.names = _csv_names(path) if self.is_csv else _json_names(path)
        except (OSError, ValueError, csv.Error) as error:
            raise self._malformed(error) from error

    def read(self, wanted: dict[str, str]) -> Batches:
        """Return the batches; raises ``Retype`` until every column has a type that fits."""
        known = {role: self._known[role][self._types.setdefault(role, 0)] for role in wanted}
        types = {name: known[role] for role, name in wanted.items()}
        schema = pa.schema(list(types.items()))
        return schema, self._batches(schema, {name: role for role, name in wanted.items()})

    def _batches(
        self, schema: pa.Schema, roles: dict[str, str]
    ) -> Iterator[tuple[pa.RecordBatch, float]]:
        total = max(1, self._file_path.stat().st_size)
        try:
            with self._file_path.open("rb") as file:
                reader = _open_csv(file, schema) if self.is_csv else _open_json(file, schema)
                for batch in reader:
                    yield batch.select(schema.names), min(1.0, file.tell() / total)
        except (pa.ArrowException, OSError) as error:
            self._retype(str(error), schema, roles)
            raise self._malformed(error) from error

    def _retype(self, message: str, schema: pa.Schema, roles: dict[str, str]) -> None:
        """Go on to the next type of the column that an error of Arrow is about."""
        for name, role in roles.items():
            kind = schema.field(name).type
            if self.is_csv:
                mine = f"CSV column #{self.names.index(name)}:" in message
                mine = mine and "CSV conversion error" in message
            else:  # a number of the wrong kind is reported without its column; ids have no other
                mine = f"Column(/{name}) changed from" in message or (
                    role == "time" and f"Failed to convert JSON to {kind}" in message
                )
            if mine and self._types[role] + 1 < len(self._known[role]):
                self._types[role] += 1
                raise Retype

    def _malformed(self, error: Exception) -> DataError:
        kind = "CSV" if self.is_csv else "JSON"
        return DataError(
            f"{self.label}: a malformed {kind} file ({said(error)}); mend that line, or write "
            "the log as Parquet"
        )


def _csv_names(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(csv.reader(file), [])


def _json_names(path: Path) -> list[str]:
    names: dict[str, None] = {}
    with path.open(encoding="utf-8-sig") as file:
        for line in file.readlines(_NAMES_BYTES):
            record = json.loads(line) if line.strip() else {}
            if not isinstance(record, dict):
                raise ValueError(f"expected an object a line, got {type(record).__name__}")
            names.update(dict.fromkeys(record))
    return list(names)


def _open_csv(file: Any, schema: pa.Schema) -> Any:
    if not file.readline().strip() or not file.read(1):
        return iter(())  # only a header, which open_csv takes for an error
    file.seek(0)
    return pyarrow.csv.open_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
        # An unquoted NA, null or NaN is no value, in a column of strings too.
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=schema.names, column_types=schema,
            strings_can_be_null=True, quoted_strings_can_be_null=False,
        ),
    )  # fmt: skip


def _open_json(file: Any, schema: pa.Schema) -> Any:
    if not file.read(1):
        return iter(())
    file.seek(0)
    return pyarrow.json.open_json(
        file,
        read_options=pyarrow.json.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=schema, unexpected_field_behavior="ignore"
        ),
    )
