"""Reads an event log of any kind; what is wrong with a bad one is said in one line."""

from __future__ import annotations

import difflib
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pinet_fast.data._columns import Column, is_text, numpy_of
from pinet_fast.data.sources import Retype, Source, checked_log_path, source_of
from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["SIMULATED_KEY", "EventLog", "LogReader", "Order", "checked_log_path", "read_log"]

Order = Literal["auto", "timestamp", "rows"]

SIMULATED_KEY = b"pinet_fast.simulated"
"""Key of the schema metadata that marks a log as generated, with the value ``true``."""

_MAX_LISTED = 20


@dataclass(frozen=True, eq=False)
class EventLog:
    """Events in the order of the rows of their log.

    Attributes:
        path: The file or folder; None for a table in memory.
        users: Original user ids, int64 or uint64 [E], or an object array of str.
        items: Original item ids, likewise.
        timestamps: int64 or float64 [E], in the unit of the file, or None where the order of the
            rows is the sequence.
        simulated: Whether the file says that it was generated.
    """

    path: Path | None
    users: npt.NDArray[Any]
    items: npt.NDArray[Any]
    timestamps: npt.NDArray[np.int64] | npt.NDArray[np.float64] | None
    simulated: bool

    @property
    def num_events(self) -> int:
        """Return E."""
        return len(self.users)


def read_log(
    log: Any,
    *,
    user: str = "user",
    item: str = "item",
    timestamp: str = "timestamp",
    order: Order = "auto",
) -> EventLog:
    """Read the user, item and timestamp columns of a log into memory; no other is decoded.

    Args:
        log: A ``.parquet``, ``.csv`` (with a header), ``.jsonl``, ``.ndjson``, ``.arrow`` or
            ``.feather`` file, a folder of Parquet files, an Arrow table or reader, or anything
            with ``__arrow_c_stream__`` (pandas, Polars, DuckDB). One event a row; or one sequence
            a row, where the item column holds lists.
        user: Column of the user ids: 64-bit integers, floats that are whole, or strings. -1 (of
            uint64, the last number) is refused: it means none in many logs, and padding in a store.
        item: Column of the item ids, likewise.
        timestamp: Column of the times: integers, floats, or Arrow timestamps or dates.
        order: ``"timestamp"`` demands the timestamp column, ``"rows"`` ignores it, and
            ``"auto"`` uses it where the log has it (or where it was renamed).

    Returns:
        The events, in the order of the rows.

    Raises:
        DataError: The log cannot be read, or its columns cannot be used; one line with the fix.
        ConfigError: ``order`` is none of the three.
    """
    reader = LogReader(log, user=user, item=item, timestamp=timestamp, order=order)
    while True:
        try:
            batches = [batch for batch, _ in reader.batches()]
            break
        except Retype:
            continue
    table = pa.Table.from_batches(batches)
    columns = {name: numpy_of(table.column(name)) for name in table.column_names}
    return EventLog(
        path=reader.source.path,
        users=columns["user"],
        items=columns["item"],
        timestamps=columns.get("time"),
        simulated=reader.simulated,
    )


class LogReader:
    """A log whose columns were found; yields its events in checked batches.

    Args:
        log: As for ``read_log``.
        user: Column of the user ids.
        item: Column of the item ids.
        timestamp: Column of the times.
        order: ``"auto"``, ``"timestamp"`` or ``"rows"``.

    Raises:
        DataError: The log is missing or of an unknown kind, or lacks a column.
        ConfigError: ``order`` is none of the three.
    """

    def __init__(
        self,
        log: Any,
        *,
        user: str = "user",
        item: str = "item",
        timestamp: str = "timestamp",
        order: Order = "auto",
    ) -> None:
        if order not in get_args(Order):
            raise ConfigError(f"order: expected one of {', '.join(get_args(Order))}; got {order!r}")
        self.source: Source = source_of(log)
        names = self.source.names
        self._wanted = {"user": user, "item": item}
        # A timestamp column under a name of the caller's own is meant: falling back to the order
        # of the rows because of a typing error would go unnoticed.
        self.has_times = order == "timestamp" or (
            order == "auto" and (timestamp in names or timestamp != "timestamp")
        )
        if self.has_times:
            self._wanted["time"] = timestamp
        _check_names(self.source.label, names, self._wanted)

    @property
    def simulated(self) -> bool:
        """Return whether the log says that it was generated."""
        return self.source.metadata.get(SIMULATED_KEY) == b"true"

    def batches(self) -> Iterator[tuple[pa.RecordBatch, float]]:
        """Yield batches of columns user, item and maybe time, with the share read by then.

        Ids come as int64, uint64 or large_string, times as int64 or float64. A bad value ends the
        batches; the rest of the log is still read, to say how many there are.

        Raises:
            Retype: The columns of a text file are of other types: drop what came, call again.
            DataError: A value cannot be used, or there is none.
        """
        schema, stored = self.source.read(self._wanted)
        label = self.source.label
        is_list = _is_list(schema.field(self._wanted["item"]).type)
        columns = {}
        for role, name in self._wanted.items():
            kind = schema.field(name).type
            if is_list and role != "user" and _is_list(kind):
                kind = kind.value_type
            columns[role] = Column(f"{label}: {role} column {name!r}", kind, role)
        base = 0
        for batch, share in stored:
            arrays = dict(zip(self._wanted, batch.columns, strict=True))
            if is_list:
                arrays = _exploded(arrays, label, base)
            taken = {role: column.take(arrays[role], base) for role, column in columns.items()}
            base += len(arrays["item"])
            if all(array is not None for array in taken.values()) and len(arrays["item"]):
                yield pa.record_batch(taken), share
        for column in columns.values():
            if refusal := column.refusal():
                raise refusal
        if base == 0:
            raise DataError(f"{label}: expected at least one event, got 0 rows; give another log")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _exploded(arrays: dict[str, pa.Array], label: str, base: int) -> dict[str, pa.Array]:
    """Return an event a row from a sequence a row; flatten() heeds slices, `values` does not."""
    items = arrays["item"]
    for role, array in arrays.items():
        if role != "user" and array.null_count:
            raise DataError(
                f"{label}: {role} column: expected a list in every row, got {array.null_count:,} "
                f"null rows after {base:,} events; drop them, or write empty lists"
            )
    lengths = pc.list_value_length(items)
    rows = pa.array(np.repeat(np.arange(len(items)), lengths.to_numpy(zero_copy_only=False)))
    users = arrays["user"]
    if is_text(users.type):  # Arrow cannot take from views of strings
        users = users.cast(pa.large_string())
    events = {"user": users.take(rows), "item": items.flatten()}
    if "time" in arrays:
        times = arrays["time"]
        if not _is_list(times.type) or not pc.list_value_length(times).equals(
            lengths.cast(pc.list_value_length(times).type)
        ):
            raise DataError(
                f"{label}: expected a list of times as long as the list of items in every row, got "
                f"{times.type}; mend them, or take the order of the lists with --order rows"
            )
        events["time"] = times.flatten()
    return events


def _check_names(label: str, names: list[str], wanted: dict[str, str]) -> None:
    found = ", ".join(repr(name) for name in names[:_MAX_LISTED]) or "no column"
    if len(names) > _MAX_LISTED:
        found += f" and {len(names) - _MAX_LISTED} more"
    for role, name in wanted.items():
        count = names.count(name)
        if count > 1:
            raise DataError(
                f"{label}: expected one column {name!r}, got {count}; found {found}; "
                "rename all but one"
            )
        if count == 0:
            raise DataError(
                f"{label}: no {role} column {name!r}; found {found}; {_fix(role, name, names)}"
            )
    if len(set(wanted.values())) < len(wanted):
        raise DataError(
            f"{label}: expected one column a role, got {wanted}; "
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
