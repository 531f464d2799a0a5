"""Sequences of every user in one memory-mapped Arrow file, opened without copying a value."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pinet_fast.data import _store_checks as checks
from pinet_fast.data._file_state import FileState
from pinet_fast.data._histories import Histories
from pinet_fast.data.ids import Ids, StringIds, position_of
from pinet_fast.errors import DataError, StoreError

Array = npt.NDArray[Any]

_MIN_TIED = 2


@dataclass(frozen=True, eq=False)
class SequenceStore:
    """The events of U users, sorted by user id and, inside a user, in order of time.

    Arrays are read-only views of the mapped file. A store is never changed in place: ``prepare``
    replaces the file, which leaves an open store whole. What reads batches calls
    ``check_unchanged`` before each.

    Attributes:
        path: The Arrow IPC file.
        fingerprint: Hex digest of the log, the options it was read with, and the format.
        source: Name of the log.
        simulated: Whether the log was generated; whoever reports a number must say so.
        offsets: int64 [U + 1]; user ``u`` owns events ``offsets[u]`` to ``offsets[u + 1]``.
        items: Item codes 1..V, int32 [E], in ascending order of the original ids; 0 is padding.
        timestamps: int64 or float64 [E], or None where the order of the rows was the sequence.
        user_ids: Original user ids, ascending, [U]: an int64 array (uint64 where the log has such
            ids), or ``StringIds``.
        item_ids: Original item ids by code, ascending, [V + 1], likewise; index 0 is padding (-1,
            for uint64 2**64 - 1, or "").
        histories: The distinct items of every user, sorted, and where each comes first; those of
            all events, of which any split takes its part.
        min_user_events: Users with fewer events were dropped.
        min_item_events: Items with fewer events were dropped.
        rows_dropped: Events of the log that were dropped with them.
    """

    path: Path
    fingerprint: str
    source: str
    simulated: bool
    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    timestamps: npt.NDArray[np.int64] | npt.NDArray[np.float64] | None
    user_ids: Ids
    item_ids: Ids
    histories: Histories
    min_user_events: int = 1
    min_item_events: int = 1
    rows_dropped: int = 0
    _state: FileState | None = field(default=None, repr=False)

    def check_unchanged(self) -> None:
        """Refuse to go on if the mapped file was written to since it was opened.

        It compares the size and time of the file, in a microsecond or two. Another file under the
        same name, or none, is no harm: the map is still that of the file that was opened.

        Raises:
            StoreError: The file has another size or time than when it was opened.
        """
        if self._state is not None and self._state.is_changed(self.path):
            raise StoreError(
                f"store {self.path}: it was written to while it was open, so its events are not "
                "those of the log any more; prepare the log again, and open the new store"
            )

    @property
    def num_users(self) -> int:
        """Return U."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Return V, without padding."""
        return len(self.item_ids) - 1

    @property
    def num_events(self) -> int:
        """Return E."""
        return len(self.items)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the events of every user, a new int64 [U]."""
        return np.diff(self.offsets)

    @cached_property
    def time_ties(self) -> int | None:
        """Return how many users have a tie between their last two events, or None without times.

        Where it is not 0, the order of the rows decides which event is held out as the last.
        """
        if self.timestamps is None:
            return None
        last = self.offsets[1:][self.lengths() >= _MIN_TIED] - 1
        return int(np.count_nonzero(self.timestamps[last] == self.timestamps[last - 1]))

    def item_code(self, original: int | str) -> int:
        """Return the code of an item, 1..V; the way back is ``item_ids[code]``.

        Args:
            original: The item's id in the log.

        Returns:
            The code.

        Raises:
            DataError: No such item is in the store.
        """
        return self._position(self.item_ids, original, 1, "item")

    def user_row(self, original: int | str) -> int:
        """Return the row of a user, 0..U-1; the way back is ``user_ids[row]``.

        Args:
            original: The user's id in the log.

        Returns:
            The row.

        Raises:
            DataError: No such user is in the store.
        """
        return self._position(self.user_ids, original, 0, "user")

    def _position(self, ids: Ids, original: int | str, first: int, role: str) -> int:
        found = position_of(ids, original, first)
        if found is None:
            kind = "strings" if isinstance(ids, StringIds) else "integers"
            raise DataError(
                f"store {self.path}: no {role} {original!r} (its {role} ids are {kind}, "
                f"{ids[first]!s} to {ids[len(ids) - 1]!s}); check the id and its type"
            )
        return found

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> SequenceStore:
        """Map a store that ``prepare`` wrote; no value is copied.

        Args:
            path: The Arrow IPC file.
            verify: Whether to read every value once and compare its range and the checksum.
                False reads the offsets only, for stores larger than memory.

        Returns:
            The store.

        Raises:
            StoreError: The file is missing, cut off, foreign, of another version, or changed.
        """
        path = Path(path)
        state = FileState.of(path)
        schema, batch = checks.read_batch(path)
        about = checks.about_of(path, schema)
        checks.check_columns(path, schema, batch)
        items = batch.column("items")
        # The sliced-away part of a list is still in its `values`: the offsets say what counts.
        offsets = _view(items.offsets)
        if len(batch) == 0 or offsets[0] != 0 or offsets[-1] != len(items.values):
            raise checks.damaged(path, "its offsets do not span its events")
        times = batch.column("timestamps").values if "timestamps" in schema.names else None
        store = cls(
            path=path,
            fingerprint=str(about["fingerprint"]),
            source=str(about["source"]),
            simulated=bool(about["simulated"]),
            offsets=offsets,
            items=_view(items.values.indices),
            timestamps=None if times is None else _view(times),
            user_ids=_ids_view(batch.column("user")),
            item_ids=_ids_view(items.values.dictionary),
            histories=_histories_view(path, batch.column("history")),
            min_user_events=int(about["min_user_events"]),
            min_item_events=int(about["min_item_events"]),
            rows_dropped=int(about["rows_dropped"]),
            _state=state,
        )
        checks.check_counts(store, about)
        if verify:
            checks.check_values(store, about)
        return store

    @classmethod
    def from_arrow(
        cls,
        sequences: Any,
        *,
        user: str = "user",
        items: str = "items",
        timestamps: str | None = None,
        store_dir: str | Path | None = None,
    ) -> SequenceStore:
        """Store sequences that are grouped already: a user and a list of items a row.

        Chunked tables, slices, ``list`` and ``large_list`` columns are read batch by batch, never
        combined. Items are numbered anew, so the values are copied once, to disk; a user in
        several rows gets one sequence, in order of the rows, and one without events none.

        Args:
            sequences: An Arrow file or another log that ``prepare`` takes, or a table.
            user: Column of the user ids.
            items: Column of the lists of item ids, in order of time.
            timestamps: Column of lists of times as long as those of the items; None takes the
                order of the lists.
            store_dir: Folder of stores, as for ``prepare``.

        Returns:
            The store, memory-mapped.

        Raises:
            DataError: The columns cannot be used, or a row is null.
            StoreError: The store cannot be written.
        """
        from pinet_fast.data.preparation import prepare  # which writes stores, and so imports this

        return prepare(
            sequences, user=user, item=items, timestamp=timestamps or "timestamp",
            order="rows" if timestamps is None else "timestamp", store_dir=store_dir,
        )  # fmt: skip

    def __repr__(self) -> str:
        label = ", simulated" if self.simulated else ""
        return (
            f"SequenceStore({self.source}: {self.num_users:,} users, {self.num_items:,} items, "
            f"{self.num_events:,} events{label})"
        )


def batch_of(
    *,
    offsets: Array,
    items: Array,
    timestamps: Array | None,
    user_ids: Any,
    item_ids: Any,
    history_offsets: Array,
    history_items: Array,
    history_firsts: Array,
) -> pa.RecordBatch:
    """Return the record batch of a store, without its metadata; the arrays are not copied."""
    codes = pa.DictionaryArray.from_arrays(pa.array(items), _arrow(item_ids), safe=False)
    starts = pa.array(offsets)
    columns = {
        "user": _arrow(user_ids),
        "items": pa.LargeListArray.from_arrays(starts, codes),
    }
    entries = pa.StructArray.from_arrays(
        [pa.array(history_items), pa.array(history_firsts)], names=["item", "first"]
    )
    columns["history"] = pa.LargeListArray.from_arrays(pa.array(history_offsets), entries)
    if timestamps is not None:
        columns["timestamps"] = pa.LargeListArray.from_arrays(starts, pa.array(timestamps))
    return pa.record_batch(columns)


def checked_arrays(store: SequenceStore) -> dict[str, Array]:
    """Return the arrays that the checksums of a store cover, by name."""
    arrays: dict[str, Array] = {"offsets": store.offsets, "items": store.items}
    if store.timestamps is not None:
        arrays["timestamps"] = store.timestamps
    histories = store.histories
    arrays |= {
        "history_offsets": histories.offsets,
        "history_items": histories.items,
        "history_firsts": histories.firsts,
    }
    for name, ids in (("user_ids", store.user_ids), ("item_ids", store.item_ids)):
        parts = ids.buffers() if isinstance(ids, StringIds) else [ids]
        arrays |= {f"{name}.{part}": array for part, array in enumerate(parts)}
    return arrays


def checksum(array: Array) -> int:
    """Return the CRC-32 of an array."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _arrow(ids: Any) -> pa.Array:
    if isinstance(ids, StringIds):
        return ids.array
    return ids if isinstance(ids, pa.Array) else pa.array(ids)


def _view(array: pa.Array) -> Array:
    return cast("Array", array.to_numpy(zero_copy_only=True))


def _histories_view(path: Path, lists: pa.Array) -> Histories:
    offsets, entries = _view(lists.offsets), lists.values
    if offsets[0] != 0 or offsets[-1] != len(entries):
        raise checks.damaged(path, "the offsets of its histories do not span them")
    return Histories(offsets, *(_view(entries.field(name)) for name in ("item", "first")))


def _ids_view(array: pa.Array) -> Ids:
    return StringIds(array) if pa.types.is_large_string(array.type) else _view(array)


def is_store(path: str | Path) -> bool:
    """Return whether a file says that it is a store; a damaged one may not."""
    path = Path(path)
    if not path.is_file() or path.suffix != ".arrow":
        return False
    try:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_file(file).schema
            return checks.METADATA_KEY in (schema.metadata or {})
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return False
