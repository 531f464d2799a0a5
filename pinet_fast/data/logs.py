"""Reads an event log, Parquet or CSV; what is wrong with a bad one is said in one line."""

from __future__ import annotations

import csv
import difflib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pinet_fast.data._columns import ids_of, times_of
from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Order = Literal["auto", "timestamp", "rows"]

SIMULATED_KEY = b"pinet_fast.simulated"
"""Key of the Parquet schema metadata that marks a log as generated, with the value ``true``."""

_MAX_LISTED = 20


@dataclass(frozen=True, eq=False)
class EventLog:
    """Events in the order of the rows of their file.

    Attributes:
        path: The file.
        users: Original user ids, int64 [E].
        items: Original item ids, int64 [E].
        timestamps: int64 or float64 [E], in the unit of the file, or None where the order of the
            rows is the sequence.
        simulated: Whether the file says that it was generated.
    """

    path: Path
    users: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    timestamps: npt.NDArray[np.int64] | npt.NDArray[np.float64] | None
    simulated: bool

    @property
    def num_events(self) -> int:
        """Return E."""
        return len(self.users)


def read_log(
    path: str | Path,
    *,
    user: str = "user",
    item: str = "item",
    timestamp: str = "timestamp",
    order: Order = "auto",
) -> EventLog:
    """Read the user, item and timestamp columns of a log; no other column is decoded.

    Args:
        path: A ``.parquet`` or ``.csv`` file, one event a row; a CSV file begins with a header.
        user: Column of the user ids: integers >= 0, or floats that are whole.
        item: Column of the item ids, likewise.
        timestamp: Column of the times: integers, floats, or Arrow timestamps or dates.
        order: ``"timestamp"`` demands the timestamp column, ``"rows"`` ignores it, and
            ``"auto"`` uses it where the file has it (or where it was renamed).

    Returns:
        The events, in the order of the rows.

    Raises:
        DataError: The file cannot be read, or its columns cannot be used; one line with the fix.
        ConfigError: ``order`` is none of the three.
    """
    path = checked_log_path(path)
    if order not in get_args(Order):
        raise ConfigError(f"order: expected one of {', '.join(get_args(Order))}; got {order!r}")
    names = _column_names(path)
    wanted = {"user": user, "item": item}
    # A timestamp column under a name of the caller's own is meant: falling back to the order of
    # the rows because of a typing error would go unnoticed.
    if order == "timestamp" or (
        order == "auto" and (timestamp in names or timestamp != "timestamp")
    ):
        wanted["time"] = timestamp
    _check_names(path, names, wanted)
    table = _read_table(path, list(wanted.values()))
    if table.num_rows == 0:
        raise DataError(f"log {path}: expected at least one event, got 0 rows; give another log")
    metadata = table.schema.metadata or {}
    return EventLog(
        path=path,
        users=ids_of(table.column(user), path, "user", user),
        items=ids_of(table.column(item), path, "item", item),
        timestamps=times_of(table.column(timestamp), path, timestamp) if "time" in wanted else None,
        simulated=metadata.get(SIMULATED_KEY) == b"true",
    )


def checked_log_path(path: str | Path) -> Path:
    """Return ``path`` if it is a readable file with a known suffix.

    Args:
        path: A ``.parquet`` or ``.csv`` file.

    Returns:
        The path.

    Raises:
        DataError: It is missing, a folder, of another suffix, or cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(
            f"log {path}: expected a file, got a folder; give one .parquet or .csv file"
        )
    if not path.exists():
        raise DataError(f"log {path}: no such file; check the path (it is read from {Path.cwd()})")
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise DataError(
            f"log {path}: expected a name ending in .parquet or .csv, got {path.suffix!r}; "
            "convert the log or rename it"
        )
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(
            f"log {path}: cannot be opened ({error.strerror}); check its permissions"
        ) from error
    return path


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _column_names(path: Path) -> list[str]:
    try:
        if _is_csv(path):
            with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
                return next(csv.reader(file), [])
        return list(pyarrow.parquet.read_schema(path).names)
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise _unreadable(path, error) from error


def _read_table(path: Path, names: list[str]) -> pa.Table:
    try:
        if _is_csv(path):
            options = pyarrow.csv.ConvertOptions(include_columns=names)
            return pyarrow.csv.read_csv(path, convert_options=options)
        # Not pyarrow.parquet.read_table: it would take a folder name such as day=1 for a column.
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    if _is_csv(path):
        what, fix = "a malformed CSV file", "mend that line, or write the log as Parquet"
    else:
        what, fix = "not a whole Parquet file", "write or download it again"
    said = " ".join(str(error).split())
    return DataError(f"log {path}: {what} ({said[:200]}); {fix}")


def _check_names(path: Path, names: list[str], wanted: dict[str, str]) -> None:
    found = ", ".join(repr(name) for name in names[:_MAX_LISTED]) or "no column"
    if len(names) > _MAX_LISTED:
        found += f" and {len(names) - _MAX_LISTED} more"
    for role, name in wanted.items():
        count = names.count(name)
        if count > 1:
            raise DataError(
                f"log {path}: expected one column {name!r}, got {count}; found {found}; "
                "rename all but one"
            )
        if count == 0:
            raise DataError(
                f"log {path}: no {role} column {name!r}; found {found}; {_fix(role, name, names)}"
            )
    if len(set(wanted.values())) < len(wanted):
        raise DataError(
            f"log {path}: expected one column a role, got {wanted}; "
            "name different ones with --user-col, --item-col and --time-col"
        )


def _fix(role: str, name: str, names: list[str]) -> str:
    if len(names) == 1 and any(mark in names[0] for mark in "\t;|"):
        return "separate the columns by commas"
    lowered = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    value = shlex.quote(lowered[near[0]]) if near else "NAME"
    fix = f"name it with --{role}-col {value}"
    return f"{fix}, or take the order of the rows with --order rows" if role == "time" else fix
