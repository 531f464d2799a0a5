"""Writes a store larger than memory: values go to files, and from file to file into the store.

A store is one record batch, so that every column is one buffer that is mapped as it is; but Arrow
writes a batch only when all of it is there. So every buffer is first streamed into a file of its
own. Then Arrow writes the batch from maps of these files, into a sink that leaves a hole where a
mapped buffer would go, and the files are copied into the holes piece by piece. What is written is
what Arrow itself would have written, and memory holds one piece.
"""

from __future__ import annotations

import mmap
import zlib
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

_COPY_BYTES = 8 << 20


class Spool:
    """A file that takes the values of one buffer, with their CRC-32.

    Args:
        path: File to make.
        dtype: Type of the values.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.crc = 0
        self.size = 0
        self.file: BinaryIO = path.open("w+b")

    def append(self, values: npt.NDArray[Any]) -> None:
        """Write values after those that are there."""
        data = np.ascontiguousarray(values, self.dtype).view(np.uint8).data
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(values)
        self.file.write(data)

    @cached_property
    def mapped(self) -> npt.NDArray[Any]:
        """Return the values, mapped: nothing is read until it is looked at. Append no more."""
        self.file.flush()
        if self.size == 0:
            return np.zeros(0, self.dtype)
        area = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(area, self.dtype)


class IdSpool:
    """A file of integer ids, or two files of strings: their offsets and their bytes.

    Args:
        folder: Where to make them.
        name: Begin of their names.
        kind: ``int64``, ``uint64`` or ``large_string``.
    """

    def __init__(self, folder: Path, name: str, kind: pa.DataType) -> None:
        self.is_text = pa.types.is_large_string(kind)
        numbers = np.int64 if self.is_text else kind.to_pandas_dtype()
        self.spools = [Spool(folder / f"{name}.0", numbers)]
        if self.is_text:
            self.spools.append(Spool(folder / f"{name}.1", np.uint8))
            self.spools[0].append(np.zeros(1, np.int64))

    @property
    def padding(self) -> pa.Array:
        """Return what stands for padding among such ids, [1]: "", or -1 in their type."""
        if self.is_text:
            return pa.array([""])
        return pa.array(np.array([-1]).astype(self.spools[0].dtype))

    def append(self, ids: pa.Array) -> None:
        """Write ids after those that are there."""
        if not self.is_text:
            self.spools[0].append(ids.to_numpy(zero_copy_only=False))
            return
        ids = ids.cast(pa.large_string())
        _, ends, data = ids.buffers()
        offsets = np.frombuffer(ends, np.int64, len(ids) + 1, 8 * ids.offset)
        before = self.spools[1].size
        self.spools[0].append(offsets[1:] - offsets[0] + before)
        if data is not None:
            self.spools[1].append(np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]])

    def array(self) -> pa.Array:
        """Return the ids as an Arrow array of mapped buffers."""
        maps = [spool.mapped for spool in self.spools]
        if not self.is_text:
            return pa.array(maps[0])
        ends, data = pa.py_buffer(maps[0]), pa.py_buffer(maps[1])
        return pa.LargeStringArray.from_buffers(len(maps[0]) - 1, ends, data)


class Holes:
    """A sink for Arrow that leaves holes for the buffers of spools, filled by ``fill``.

    Args:
        file: The store, open for writing.
        spools: The files that its large buffers come from.
    """

    closed = False

    def __init__(self, file: BinaryIO, spools: list[Spool]) -> None:
        self._file = file
        self._spools = [spool for spool in spools if spool.size]
        self._holes: list[tuple[int, Spool, int, int]] = []

    def write(self, data: Any) -> int:
        """Write bytes, or skip their place if they lie in the map of a spool."""
        size = len(data)
        address = data.address if isinstance(data, pa.Buffer) else 0
        for spool in self._spools:
            offset = address - spool.mapped.ctypes.data
            if size and offset >= 0 and offset + size <= spool.mapped.nbytes:
                self._holes.append((self._file.tell(), spool, offset, size))
                self._file.seek(size, 1)
                return size
        self._file.write(data)
        return size

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._file.tell()

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def close(self) -> None:
        """Do nothing: the file belongs to the caller."""

    def fill(self) -> None:
        """Copy the values into their holes."""
        end = self._file.tell()
        for place, spool, offset, size in self._holes:
            self._file.seek(place)
            spool.file.seek(offset)
            for start in range(0, size, _COPY_BYTES):
                self._file.write(spool.file.read(min(_COPY_BYTES, size - start)))
        self._file.seek(end)
