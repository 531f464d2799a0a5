"""Decodes a log once into a store, out of core; the same log and options find it again."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pinet_fast import _env
from pinet_fast.data import _store_checks as layout
from pinet_fast.data._fingerprint import TableHash, file_digest, state_of
from pinet_fast.data._sorting import EventTable, memory_bytes
from pinet_fast.data._writing import StoreSpools, scratch_folder, unwritable, write_store
from pinet_fast.data.logs import LogReader, Order
from pinet_fast.data.store import SequenceStore
from pinet_fast.errors import ConfigError, DataError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

    OnProgress = Callable[[float, str], None]

_MAX_ITEMS = 2**31 - 2
_MAX_STEM_BYTES = 100
# Shares of the work, by time, for a log of some million events.
_READ, _SORTED = 0.45, 0.95


def prepare(
    log: Any,
    *,
    store_dir: str | Path | None = None,
    user: str = "user",
    item: str = "item",
    timestamp: str = "timestamp",
    order: Order = "auto",
    min_user_events: int = 1,
    min_item_events: int = 1,
    memory_limit: str | None = None,
    on_progress: OnProgress | None = None,
) -> SequenceStore:
    """Return the store of a log, written at the first call and found again by later ones.

    Users are sorted by id. Inside a user events are sorted by time, and events at the same time
    keep the order of the rows; without times the order of the rows is the sequence. The log may be
    larger than memory: it is sorted on disk, beside the store. A store that is there but damaged
    is written again.

    Args:
        log: A ``.parquet``, ``.csv`` (with a header), ``.jsonl``, ``.ndjson``, ``.arrow`` or
            ``.feather`` file, a folder of Parquet files, an Arrow table or reader, or anything
            with ``__arrow_c_stream__`` (pandas, Polars, DuckDB).
        store_dir: Folder of stores, made if need be; default ``stores`` in the cache folder
            (``PINET_FAST_CACHE``).
        user: Column of the user ids, integers or strings.
        item: Column of the item ids, integers or strings; lists of them where a row is a sequence.
        timestamp: Column of the times.
        order: ``"auto"``, ``"timestamp"`` or ``"rows"``, as for ``read_log``.
        min_user_events: Drop users with fewer events.
        min_item_events: Drop items with fewer events; both together, over and over until nothing
            is left to drop (the k-core).
        memory_limit: Most memory for sorting, such as ``"2GB"``; reading and writing need some
            100 MB beside it. Default: DuckDB's, 80% of the memory.
        on_progress: Called with the share that is done and what is being done.

    Returns:
        The store, memory-mapped.

    Raises:
        DataError: The log cannot be read or used, or changed while it was read.
        StoreError: The store cannot be written.
        ConfigError: ``order`` or a number is none of what it may be.
    """
    for name, least in (("min_user_events", min_user_events), ("min_item_events", min_item_events)):
        if isinstance(least, bool) or not isinstance(least, int) or least < 1:
            raise ConfigError(f"{name}: expected an integer >= 1, got {least!r}; 1 keeps all")
    limit = memory_bytes(memory_limit)
    report = on_progress or (lambda share, text: None)
    columns: dict[str, Any] = {"user": user, "item": item, "timestamp": timestamp, "order": order}
    reader = LogReader(log, **columns)
    filters = {"min_user_events": min_user_events, "min_item_events": min_item_events}
    folder = _env.cache_dir() / "stores" if store_dir is None else Path(store_dir)
    work = _Work(reader, columns | filters, folder, report)
    if (found := work.found()) is not None:
        return found
    with scratch_folder(folder) as scratch:
        table = EventTable(scratch, limit)
        try:
            return work.write(table, scratch, **filters)
        finally:
            table.close()


class _Work:
    """One log on its way into a store."""

    def __init__(
        self, reader: LogReader, options: dict[str, Any], folder: Path, report: OnProgress
    ) -> None:
        self._reader, self._options, self._folder, self._report = reader, options, folder, report
        self._path = reader.source.path
        self._state = None if self._path is None else state_of(self._path)
        # What a table holds is known when it was read, what a file holds before.
        self._hash = TableHash() if self._path is None else None
        digest = None if self._path is None else file_digest(self._path)
        self._fingerprint = "" if digest is None else self._with_options(digest)

    def _with_options(self, digest: Any) -> str:
        about = {"format": layout.FORMAT, **self._options}
        digest.update(json.dumps(about, sort_keys=True).encode())
        return str(digest.hexdigest())

    @property
    def _target(self) -> Path:
        name = self._reader.source.name
        stem = Path(name).stem.encode()[:_MAX_STEM_BYTES].decode(errors="ignore")
        return self._folder / f"{stem}-{self._fingerprint[:16]}.arrow"

    def found(self) -> SequenceStore | None:
        """Return the store if it is there and whole."""
        if self._fingerprint and self._target.is_file():
            try:
                found = SequenceStore.open(self._target)
            except StoreError:
                return None  # damaged, or of an older format: written again
            return found if found.fingerprint == self._fingerprint else None
        return None

    def write(
        self, table: EventTable, scratch: Path, min_user_events: int, min_item_events: int
    ) -> SequenceStore:
        """Sort the events, write the store and open it."""
        kinds: dict[str, pa.DataType] = {}
        rows_read = 0

        def begin() -> None:
            nonlocal rows_read
            rows_read = 0
            self._hash = None if self._hash is None else TableHash()

        def read(batch: pa.RecordBatch, share: float) -> None:
            nonlocal rows_read
            rows_read += batch.num_rows
            kinds.update({field.name: field.type for field in batch.schema})
            if self._hash is not None:
                self._hash.update(batch)
            self._report(_READ * share, f"reading {rows_read:,} events")

        table.fill(self._reader, read, begin)
        if self._path is not None and state_of(self._path) != self._state:
            raise DataError(
                f"{self._reader.source.label}: it changed while it was read; "
                "prepare it again when written"
            )
        if self._hash is not None:
            self._fingerprint = self._with_options(self._hash.digest())
            if (found := self.found()) is not None:
                return found
        self._report(_READ, "numbering users and items")
        users, items, events = table.number(min_user_events, min_item_events)
        self._check_size(items, events, rows_read)
        about: dict[str, Any] = {
            "format": layout.FORMAT,
            "fingerprint": self._fingerprint,
            "source": self._reader.source.name,
            "simulated": self._reader.simulated,
            "num_users": users,
            "num_items": items,
            "num_events": events,
            "min_user_events": min_user_events,
            "min_item_events": min_item_events,
            "rows_dropped": rows_read - events,
        }
        try:
            with closing(StoreSpools(scratch, kinds)) as spools:
                spools.fill(table, events, self._report_sorting)
                about["crc32"] = {name: spool.crc for name, spool in spools.named().items()}
                self._report(_SORTED, "writing the store")
                write_store(self._target, spools, about)
        except OSError as error:
            raise unwritable(self._target, error) from error
        self._report(1.0, "done")
        # Checked and summed while it was written, so its values are not read again.
        return SequenceStore.open(self._target, verify=False)

    def _report_sorting(self, share: float, text: str) -> None:
        self._report(_READ + (_SORTED - _READ) * share, text)

    def _check_size(self, items: int, events: int, rows_read: int) -> None:
        label = self._reader.source.label
        if events == 0:
            raise DataError(
                f"{label}: no event is left of {rows_read:,} with --min-user-events "
                f"{self._options['min_user_events']} and --min-item-events "
                f"{self._options['min_item_events']}; choose smaller ones"
            )
        if items > _MAX_ITEMS:
            raise DataError(f"{label}: expected at most {_MAX_ITEMS:,} items, got {items:,}; "
                            "drop rare ones with --min-item-events")  # fmt: skip
