"""Original ids of users and items: integers as NumPy arrays, strings as mapped Arrow buffers.

Integers are int64, or uint64 where the log has them so. Index 0 of item ids is padding: -1, for
uint64 2**64 - 1, or "".
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Iterator


class StringIds:
    """Ids that are strings; read like an array, kept in Arrow's buffers without a copy.

    NumPy has no view of Arrow strings, so this class stands where a store of integer ids has an
    array. ``ids[3]`` is a ``str``; ``ids[1:3]`` and ``ids[array]`` are new arrays of str.

    Args:
        array: The ids, Arrow ``large_string`` without nulls.
    """

    def __init__(self, array: pa.LargeStringArray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | npt.ArrayLike) -> npt.NDArray[np.str_]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return np.array(self.array[index].to_pylist(), dtype=np.str_)
        if np.ndim(index) == 0:
            return self.array[operator.index(index)].as_py()
        rows = np.asarray(index)
        if rows.dtype == np.bool_:
            rows = np.flatnonzero(rows)
        rows = np.where(rows < 0, rows + len(self), rows).astype(np.int64)
        taken = self.array.take(pa.array(rows.ravel()))
        return np.array(taken.to_pylist(), dtype=np.str_).reshape(rows.shape)

    def __iter__(self) -> Iterator[str]:
        return (value.as_py() for value in self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.tolist(), dtype=np.str_ if dtype is None else dtype)

    def tolist(self) -> list[str]:
        """Return all ids as a list of str."""
        strings: list[str] = self.array.to_pylist()
        return strings

    def after(self, first: int) -> StringIds:
        """Return the ids from index ``first`` on; a view."""
        return StringIds(self.array[first:])

    def buffers(self) -> list[npt.NDArray[Any]]:
        """Return the offsets, int64 [N + 1], and the UTF-8 bytes, uint8; views."""
        _, offsets, data = self.array.buffers()
        ends = np.frombuffer(offsets, np.int64, len(self) + 1, 8 * self.array.offset)
        if data is None:
            return [ends, np.zeros(0, np.uint8)]
        return [ends, np.frombuffer(data, np.uint8, int(ends[-1] - ends[0]), int(ends[0]))]


Ids = npt.NDArray[np.int64] | npt.NDArray[np.uint64] | StringIds
"""Ids by row or code: an array of integers, or strings."""


def position_of(ids: Ids, original: object, first: int = 0) -> int | None:
    """Return where an id stands among ascending ids, or None.

    Args:
        ids: The ids, ascending from index ``first``.
        original: The id: an integer, or a str where the ids are strings.
        first: Where to begin; index 0 of item ids is padding.

    Returns:
        The index in ``ids``, or None where the id is not there or of another type.
    """
    low, high = first, len(ids)
    if isinstance(ids, StringIds):
        if not isinstance(original, str):
            return None
        while low < high:  # UTF-8 and Python order strings alike, by code point
            middle = (low + high) // 2
            low, high = (middle + 1, high) if ids[middle] < original else (low, middle)
    else:
        if isinstance(original, bool) or not isinstance(original, (int, np.integer)):
            return None
        limits = np.iinfo(ids.dtype)
        if not limits.min <= int(original) <= limits.max:
            return None
        # In their own type: together with another one both would become floats.
        value = ids.dtype.type(original)
        low = first + int(np.searchsorted(ids[first:], value))
    return low if low < len(ids) and ids[low] == original else None


def ascend(ids: Ids) -> bool:
    """Return whether every id is greater than the one before it."""
    if isinstance(ids, StringIds):
        if len(ids) <= 1:
            return True
        return bool(pc.all(pc.less(ids.array[:-1], ids.array[1:])).as_py())
    return bool((ids[1:] > ids[:-1]).all())
