"""Turns the columns of a log into checked NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pinet_fast.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_EXACT_FLOAT = 2.0**53
_USE_ROWS = "or take the order of the rows with --order rows"


def ids_of(column: pa.ChunkedArray, path: Path, role: str, name: str) -> npt.NDArray[np.int64]:
    """Return the ids in a column.

    Args:
        column: The column as read.
        path: The log, for messages.
        role: ``"user"`` or ``"item"``, for messages.
        name: Name of the column, for messages.

    Returns:
        int64 [E], a new array or a view of the column.

    Raises:
        DataError: Nulls, NaN, infinities, other types than integers or whole floats, ids that are
            negative or do not fit int64.
    """
    where = f"log {path}: {role} column {name!r}"
    column = _plain(column)
    _check_nulls(column, where, "drop or fill these rows")
    if pa.types.is_floating(column.type):
        return _whole(column.to_numpy().astype(np.float64), where)
    if not pa.types.is_integer(column.type):
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        fix = (
            "string ids are not supported yet: number them first"
            if is_text
            else "cast the column to int64"
        )
        raise DataError(f"{where}: expected integer ids, got type {column.type}; {fix}")
    values = column.to_numpy()
    _refuse(values < 0, values, where, "ids >= 0", "number them from 0 or 1")
    if column.type == pa.uint64():
        too_large = values > np.iinfo(np.int64).max
        _refuse(too_large, values, where, "ids below 2**63", "number them from 1")
    return np.asarray(values, dtype=np.int64)


def times_of(
    column: pa.ChunkedArray, path: Path, name: str
) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
    """Return the times in a column, in its own unit.

    Args:
        column: The column as read.
        path: The log, for messages.
        name: Name of the column, for messages.

    Returns:
        [E]: int64 for integers, Arrow timestamps and dates, float64 for floats.

    Raises:
        DataError: Nulls, NaN, infinities, or a type that is no time.
    """
    where = f"log {path}: time column {name!r}"
    column = _plain(column)
    _check_nulls(column, where, f"fill them, {_USE_ROWS}")
    kind = column.type
    if pa.types.is_floating(kind):
        times: npt.NDArray[np.float64] = column.to_numpy().astype(np.float64)
        _refuse(~np.isfinite(times), times, where, "finite times", f"drop these rows, {_USE_ROWS}")
        return times
    if pa.types.is_date32(kind):
        column = column.cast(pa.int32())
    elif pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        column = column.cast(pa.int64())
    elif not pa.types.is_integer(kind):
        raise DataError(
            f"{where}: expected numbers, timestamps or dates, got type {kind}; "
            f"convert the column, {_USE_ROWS}"
        )
    values = column.to_numpy()
    if kind == pa.uint64():
        too_large = values > np.iinfo(np.int64).max
        _refuse(too_large, values, where, "times below 2**63", f"mend them, {_USE_ROWS}")
    return np.asarray(values, dtype=np.int64)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    return column


def _check_nulls(column: pa.ChunkedArray, where: str, fix: str) -> None:
    if column.null_count:
        first = int(np.flatnonzero(column.is_null().to_numpy())[0]) + 1
        raise DataError(
            f"{where}: expected a value in every row, got {column.null_count:,} nulls, "
            f"the first in row {first:,}; {fix}"
        )


def _whole(values: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.int64]:
    _refuse(~np.isfinite(values), values, where, "integer ids", "drop or fill these rows")
    fractional = values != np.floor(values)
    _refuse(fractional, values, where, "integer ids", "number them first")
    inexact = np.abs(values) > _MAX_EXACT_FLOAT
    _refuse(inexact, values, where, "floats that are exact (up to 2**53)", "store ids as int64")
    _refuse(values < 0, values, where, "ids >= 0", "number them from 0 or 1")
    return values.astype(np.int64)


def _refuse(
    is_bad: npt.NDArray[np.bool_], values: npt.NDArray[np.generic], where: str, want: str, fix: str
) -> None:
    rows = np.flatnonzero(is_bad)
    if len(rows):
        raise DataError(
            f"{where}: expected {want}, got {values[rows[0]]} in row {rows[0] + 1:,} "
            f"({len(rows):,} such rows); {fix}"
        )
