"""Checks a store file before anything in it is used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pinet_fast.data.ids import ascend
from pinet_fast.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from pinet_fast.data.store import SequenceStore

FORMAT = 3
"""Version of the layout; a store of another version is refused, and prepared again."""

METADATA_KEY = b"pinet_fast.store"
"""Key of the schema metadata that holds the counts and checksums of a store, as JSON."""

# One record batch. The ids of the items are the dictionary of the item column: Arrow's own place
# for them, so that they are mapped like the values, cannot be parted from them, have no size limit
# (schema metadata is copied at every open, twice), and any Arrow reader shows the original ids.
_ID_TYPES = (pa.int64(), pa.uint64(), pa.large_string())
_ITEMS_TYPES = tuple(pa.large_list(pa.dictionary(pa.int32(), kind)) for kind in _ID_TYPES)
# The codes are plain integers here: a second dictionary would be a second copy of the ids.
_HISTORY_TYPE = pa.large_list(pa.struct([("item", pa.int32()), ("first", pa.int32())]))
_KEYS = frozenset({
    "fingerprint", "source", "simulated", "num_users", "num_items", "num_events",
    "min_user_events", "min_item_events", "rows_dropped", "crc32",
})  # fmt: skip


_ENTRIES_AT_ONCE = 1 << 22


def damaged(path: Path, why: str) -> StoreError:
    """Return the error for a store whose values cannot be trusted."""
    return StoreError(f"store {path}: {why}; it is damaged: delete it and prepare the log again")


def read_batch(path: Path) -> tuple[pa.Schema, pa.RecordBatch]:
    """Map a file and return its schema and its only batch."""
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


def about_of(path: Path, schema: pa.Schema) -> dict[str, Any]:
    """Return the metadata of a store."""
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise _foreign(path, "an Arrow file without the metadata of a store")
    try:
        about = json.loads(text)
    except ValueError:
        raise damaged(path, "its metadata is no JSON") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        version = about.get("format") if isinstance(about, dict) else None
        raise StoreError(
            f"store {path}: expected format {FORMAT}, got {version}, of another version of "
            "pinet_fast; prepare the log again, which writes a new store beside it"
        )
    if missing := sorted(_KEYS - about.keys()):
        raise damaged(path, f"its metadata lacks {', '.join(missing)}")
    return about


def check_columns(path: Path, schema: pa.Schema, batch: pa.RecordBatch) -> None:
    """Check the types of the columns, and that nothing is null."""
    types = {field.name: field.type for field in schema}
    times = types.pop("timestamps", None)
    known_times = (None, pa.large_list(pa.int64()), pa.large_list(pa.float64()))
    is_known = types.pop("user", None) in _ID_TYPES and types.pop("items", None) in _ITEMS_TYPES
    is_known = types.pop("history", None) == _HISTORY_TYPE and is_known
    if types or not is_known or times not in known_times:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise _foreign(path, f"columns {found}")
    try:
        batch.validate()
        batch.column("items").values.dictionary.validate()
    except pa.ArrowException as error:
        raise damaged(path, " ".join(str(error).split())[:200]) from error
    items = batch.column("items")
    histories = batch.column("history")
    parts = [batch.column("user"), items, items.values, items.values.dictionary]
    parts += [histories, histories.values, *histories.values.flatten()]
    if times is not None:
        parts += [batch.column("timestamps"), batch.column("timestamps").values]
    if any(part.null_count for part in parts):
        raise damaged(path, "it holds nulls")


def check_counts(store: SequenceStore, about: dict[str, Any]) -> None:
    """Check the counts against the metadata, and that every user has events."""
    for name in ("num_users", "num_items", "num_events"):
        if getattr(store, name) != about[name]:
            got, want = getattr(store, name), about[name]
            raise damaged(store.path, f"expected {name} = {want}, got {got}")
    if bool((np.diff(store.offsets) <= 0).any()):
        raise damaged(store.path, "its offsets do not increase")
    if store.timestamps is not None and len(store.timestamps) != store.num_events:
        raise damaged(store.path, "its timestamps do not match its events")
    if bool((np.diff(store.histories.offsets) <= 0).any()):
        raise damaged(store.path, "the offsets of its histories do not increase")


def check_values(store: SequenceStore, about: dict[str, Any]) -> None:
    """Read every value and compare its checksum, its range and its order.

    Raises:
        StoreError: The store is damaged.
    """
    from pinet_fast.data.store import checked_arrays, checksum

    # First of all: offsets of strings must be right before a string is looked at.
    sums = {name: checksum(array) for name, array in checked_arrays(store).items()}
    if sums != about["crc32"]:
        raise damaged(store.path, "its values changed since it was written")
    low, high = int(store.items.min()), int(store.items.max())
    if low < 1 or high > store.num_items:
        raise damaged(store.path, f"expected item codes 1..{store.num_items}, got {low}..{high}")
    _check_histories(store)
    for name, ids, first in (("user", store.user_ids, 0), ("item", store.item_ids, 1)):
        if not ascend(ids[first:] if isinstance(ids, np.ndarray) else ids.after(first)):
            raise damaged(store.path, f"its {name} ids do not ascend")


def _check_histories(store: SequenceStore) -> None:
    items, firsts, offsets = store.histories.items, store.histories.firsts, store.histories.offsets
    low, high = int(items.min()), int(items.max())
    if low < 1 or high > store.num_items:
        raise damaged(
            store.path, f"expected item codes 1..{store.num_items} in histories, got {low}..{high}"
        )
    first = 0
    while first < store.num_users:  # whole users, some million entries at a time
        limit = offsets[first] + _ENTRIES_AT_ONCE
        last = max(first + 1, int(np.searchsorted(offsets, limit, side="right")) - 1)
        start, end = offsets[first], offsets[last]
        users = np.repeat(np.arange(first, last), np.diff(offsets[first : last + 1]))
        places, own = store.offsets[users] + firsts[start:end], items[start:end]
        same_user = users[1:] == users[:-1]
        ascends = own[1:] > own[:-1]
        is_inside = (firsts[start:end] >= 0) & (places < store.offsets[users + 1])
        if not (is_inside.all() and ascends[same_user].all()):
            raise damaged(store.path, "its histories are not sorted lists of its users' events")
        if not np.array_equal(store.items[places], own):
            raise damaged(store.path, "its histories are not those of its events")
        first = last
