"""Turns the columns of a log, batch by batch, into checked ids and times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pinet_fast.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_EXACT_FLOAT = 2.0**53
_MAX_INT64 = np.iinfo(np.int64).max
_MAX_UINT64 = np.iinfo(np.uint64).max
_USE_ROWS = "or take the order of the rows with --order rows"


@dataclass(frozen=True)
class _Check:
    """What a value must be: ``is_bad`` finds the others; null counts as a value of its own."""

    is_bad: Callable[[pa.Array], npt.NDArray[np.bool_]]
    want: str
    fix: str


class Column:
    """A column while it is read; counts what is wrong with it instead of stopping at the first.

    Args:
        where: The log, role and name, for messages.
        kind: Arrow type of the column.
        role: ``"user"``, ``"item"`` or ``"time"``.

    Raises:
        DataError: The type can hold no ids, or no times.
    """

    def __init__(self, where: str, kind: pa.DataType, role: str) -> None:
        self.where = where
        self._checks, self.type = _times(where, kind) if role == "time" else _ids(where, kind)
        self._failed: _Check | None = None
        self._first, self._value, self._count = 0, "", 0

    def take(self, array: pa.Array, base: int) -> pa.Array | None:
        """Check and convert the next rows.

        Args:
            array: The rows as read.
            base: Number of the first one in the log, from 0.

        Returns:
            The rows as ``type``, or None if this or an earlier one is bad.
        """
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        for check in self._checks if self._failed is None else (self._failed,):
            rows = np.flatnonzero(check.is_bad(array))
            if len(rows):
                if self._failed is None:
                    self._failed, self._first = check, base + int(rows[0]) + 1
                    self._value = _shown(array[int(rows[0])])
                self._count += len(rows)
                return None
        return None if self._failed else _converted(array, self.type)

    def refusal(self) -> DataError | None:
        """Return what is wrong with the rows so far, or None."""
        if self._failed is None:
            return None
        if self._failed.is_bad is _is_null:
            got = f"{self._count:,} nulls, the first in row {self._first:,}"
        else:
            got = f"{self._value} in row {self._first:,} ({self._count:,} such rows)"
        return DataError(f"{self.where}: expected {self._failed.want}, got {got}; "
                         f"{self._failed.fix}")  # fmt: skip


def numpy_of(array: pa.Array) -> npt.NDArray[Any]:
    """Return the values of a converted column: a view of numbers, an object array of strings."""
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def _ids(where: str, kind: pa.DataType) -> tuple[list[_Check], pa.DataType]:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    nulls = _Check(_is_null, "a value in every row", "drop or fill these rows")
    if is_text(kind):
        return [nulls], pa.large_string()
    if pa.types.is_null(kind):
        return [nulls], pa.int64()
    # -1 is what many logs write for none, and what a store shows for padding.
    none = _Check(_is_minus_one, "ids other than -1", "drop the rows if it stands for none")
    if pa.types.is_floating(kind):
        fix = "drop or fill these rows"
        exact = "floats that are exact (up to 2**53)"
        return [
            nulls,
            _Check(_is_infinite, "integer ids", fix),
            _Check(_is_fraction, "integer ids", "number them first, or store them as strings"),
            _Check(_is_inexact, exact, "store ids as int64"),
            none,
        ], pa.int64()
    if not pa.types.is_integer(kind):
        raise DataError(
            f"{where}: expected integer or string ids, got type {kind}; "
            "cast the column to int64 or string"
        )
    if kind == pa.uint64():  # what hash functions give; the last value is its -1
        last = _Check(_above(_MAX_UINT64 - 1), "ids below 2**64 - 1", none.fix)
        return [nulls, last], pa.uint64()
    return [nulls, none], pa.int64()


def _times(where: str, kind: pa.DataType) -> tuple[list[_Check], pa.DataType]:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    nulls = _Check(_is_null, "a value in every row", f"fill them, {_USE_ROWS}")
    if pa.types.is_floating(kind):
        finite = _Check(_is_infinite, "finite times", f"drop these rows, {_USE_ROWS}")
        return [nulls, finite], pa.float64()
    if pa.types.is_null(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return [nulls], pa.int64()
    if not pa.types.is_integer(kind):
        raise DataError(
            f"{where}: expected numbers, timestamps or dates, got type {kind}; "
            f"convert the column, {_USE_ROWS}"
        )
    large = _Check(_above(_MAX_INT64), "times below 2**63", f"mend them, {_USE_ROWS}")
    return [nulls] + [large] * (kind == pa.uint64()), pa.int64()


def _converted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_date32(array.type):
        array = array.cast(pa.int32())
    if pa.types.is_float16(array.type):
        array = pa.array(array.to_numpy(zero_copy_only=False).astype(np.float64))
    return array if array.type == kind else array.cast(kind)


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type holds strings; Polars makes views of them."""
    views = getattr(pa.types, "is_string_view", lambda _: False)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or views(kind))


def _shown(value: pa.Scalar) -> str:
    return str(value.as_py())


def _is_null(array: pa.Array) -> npt.NDArray[np.bool_]:
    if array.null_count == 0:
        return np.zeros(0, np.bool_)
    return np.asarray(pc.is_null(array).to_numpy(zero_copy_only=False), np.bool_)


def _values(array: pa.Array) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def _is_infinite(array: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(~np.isfinite(_values(array)))


def _is_fraction(array: pa.Array) -> npt.NDArray[np.bool_]:
    values = _values(array)
    return np.asarray(values != np.floor(values))


def _is_inexact(array: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(np.abs(_values(array)) > _MAX_EXACT_FLOAT)


def _is_minus_one(array: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(_values(array) == -1)


def _above(limit: int) -> Callable[[pa.Array], npt.NDArray[np.bool_]]:
    return lambda array: np.asarray(_values(array) > limit)
