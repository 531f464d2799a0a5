"""Sequences of every user in one memory-mapped Arrow file, opened without copying a value."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pinet_fast.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMAT = 1
"""Version of the layout; a store of another version is refused, and prepared again."""

METADATA_KEY = b"pinet_fast.store"
"""Key of the schema metadata that holds the counts and the checksum of a store, as JSON."""

Array = npt.NDArray[Any]

# One record batch. The ids of the items are the dictionary of the item column: Arrow's own place
# for them, so that they are mapped like the values, cannot be parted from them, have no size limit
# (schema metadata is copied at every open, twice), and any Arrow reader shows the original ids.
_ITEMS_TYPE = pa.large_list(pa.dictionary(pa.int32(), pa.int64()))
_MIN_TIED = 2


@dataclass(frozen=True, eq=False)
class SequenceStore:
    """The events of U users, sorted by user id and, inside a user, in order of time.

    Arrays are read-only views of the mapped file. A store is never changed in place: do not write
    to its file while it is open.

    Attributes:
        path: The Arrow IPC file.
        fingerprint: Hex digest of the log, the options it was read with, and the format.
        source: Name of the log.
        simulated: Whether the log was generated; whoever reports a number must say so.
        offsets: int64 [U + 1]; user ``u`` owns events ``offsets[u]`` to ``offsets[u + 1]``.
        items: Item codes 1..V, int32 [E], in ascending order of the original ids; 0 is padding.
        timestamps: int64 or float64 [E], or None where the order of the rows was the sequence.
        user_ids: Original user ids, int64 [U], ascending.
        item_ids: Original item ids by code, int64 [V + 1]; index 0 holds -1 for padding.
    """

    path: Path
    fingerprint: str
    source: str
    simulated: bool
    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    timestamps: npt.NDArray[np.int64] | npt.NDArray[np.float64] | None
    user_ids: npt.NDArray[np.int64]
    item_ids: npt.NDArray[np.int64]

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
        schema, batch = _read_batch(path)
        about = _about(path, schema)
        _check_columns(path, schema, batch)
        items = batch.column("items")
        # The sliced-away part of a list is still in its `values`: the offsets say what counts.
        offsets = _view(items.offsets)
        if len(batch) == 0 or offsets[0] != 0 or offsets[-1] != len(items.values):
            raise _damaged(path, "its offsets do not span its events")
        times = batch.column("timestamps").values if "timestamps" in schema.names else None
        store = cls(
            path=path,
            fingerprint=str(about["fingerprint"]),
            source=str(about["source"]),
            simulated=bool(about["simulated"]),
            offsets=offsets,
            items=_view(items.values.indices),
            timestamps=None if times is None else _view(times),
            user_ids=_view(batch.column("user")),
            item_ids=_view(items.values.dictionary),
        )
        _check_counts(store, about)
        if verify:
            _check_values(store, about)
        return store

    def __repr__(self) -> str:
        label = ", simulated" if self.simulated else ""
        return (
            f"SequenceStore({self.source}: {self.num_users:,} users, {self.num_items:,} items, "
            f"{self.num_events:,} events{label})"
        )


def batch_of(
    *, offsets: Array, items: Array, timestamps: Array | None, user_ids: Array, item_ids: Array
) -> pa.RecordBatch:
    """Return the record batch of a store, without its metadata; the arrays are not copied."""
    codes = pa.DictionaryArray.from_arrays(pa.array(items), pa.array(item_ids))
    starts = pa.array(offsets)
    columns = {
        "user": pa.array(user_ids),
        "items": pa.LargeListArray.from_arrays(starts, codes),
    }
    if timestamps is not None:
        columns["timestamps"] = pa.LargeListArray.from_arrays(starts, pa.array(timestamps))
    return pa.record_batch(columns)


def checksum(arrays: Sequence[Array | None]) -> int:
    """Return the CRC-32 of the arrays one after the other; None counts as empty."""
    crc = 0
    for array in arrays:
        if array is not None:
            crc = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, crc)
    return crc


def _view(array: pa.Array) -> Array:
    return cast("Array", array.to_numpy(zero_copy_only=True))


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"store {path}: {why}; it is damaged: delete it and prepare the log again")


def _read_batch(path: Path) -> tuple[pa.Schema, pa.RecordBatch]:
    if path.is_dir() or not path.exists():
        got = "a folder" if path.is_dir() else "no such file"
        raise StoreError(f"store {path}: expected a store file, got {got}; prepare the log first")
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        if file.num_record_batches != 1:
            raise _foreign(path, f"{file.num_record_batches} record batches")
        file.schema.names  # noqa: B018 - decodes them now: damaged ones are no UTF-8
        return file.schema, file.get_batch(0)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:200]
        raise StoreError(
            f"store {path}: not a whole Arrow IPC file ({said}); "
            "it is cut off or no store: delete it and prepare the log again"
        ) from error


def _foreign(path: Path, got: str) -> StoreError:
    return StoreError(
        f"store {path}: expected a file written by prepare, got {got}; "
        "give the log to prepare and open the path of its result"
    )


def _about(path: Path, schema: pa.Schema) -> dict[str, Any]:
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise _foreign(path, "an Arrow file without the metadata of a store")
    try:
        about = json.loads(text)
    except ValueError:
        raise _damaged(path, "its metadata is no JSON") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        version = about.get("format") if isinstance(about, dict) else None
        raise StoreError(
            f"store {path}: expected format {FORMAT}, got {version}; prepare the log again"
        )
    keys = {"fingerprint", "source", "simulated", "num_users", "num_items", "num_events", "crc32"}
    if missing := sorted(keys - about.keys()):
        raise _damaged(path, f"its metadata lacks {', '.join(missing)}")
    return about


def _check_columns(path: Path, schema: pa.Schema, batch: pa.RecordBatch) -> None:
    types = {field.name: field.type for field in schema}
    times = types.pop("timestamps", None)
    known_times = (None, pa.large_list(pa.int64()), pa.large_list(pa.float64()))
    if types != {"user": pa.int64(), "items": _ITEMS_TYPE} or times not in known_times:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise _foreign(path, f"columns {found}")
    try:
        batch.validate()
    except pa.ArrowException as error:
        raise _damaged(path, " ".join(str(error).split())[:200]) from error
    items = batch.column("items")
    parts = [batch.column("user"), items, items.values, items.values.dictionary]
    if times is not None:
        parts += [batch.column("timestamps"), batch.column("timestamps").values]
    if any(part.null_count for part in parts):
        raise _damaged(path, "it holds nulls")


def _check_counts(store: SequenceStore, about: dict[str, Any]) -> None:
    for name in ("num_users", "num_items", "num_events"):
        if getattr(store, name) != about[name]:
            got, want = getattr(store, name), about[name]
            raise _damaged(store.path, f"expected {name} = {want}, got {got}")
    if bool((np.diff(store.offsets) <= 0).any()):
        raise _damaged(store.path, "its offsets do not increase")
    if store.timestamps is not None and len(store.timestamps) != store.num_events:
        raise _damaged(store.path, "its timestamps do not match its events")


def _check_values(store: SequenceStore, about: dict[str, Any]) -> None:
    low, high = int(store.items.min()), int(store.items.max())
    if low < 1 or high > store.num_items:
        raise _damaged(store.path, f"expected item codes 1..{store.num_items}, got {low}..{high}")
    for name, ids in (("user", store.user_ids), ("item", store.item_ids)):
        if bool((np.diff(ids) <= 0).any()):
            raise _damaged(store.path, f"its {name} ids do not ascend")
    if checksum(checked_arrays(store)) != about["crc32"]:
        raise _damaged(store.path, "its values changed since it was written")


def checked_arrays(store: SequenceStore) -> list[Array | None]:
    """Return the arrays that the checksum of a store covers, in order."""
    return [store.offsets, store.items, store.timestamps, store.user_ids, store.item_ids]
