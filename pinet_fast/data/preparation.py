"""Decodes a log once into a store, out of core; the same log and options find it again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pinet_fast import _env
from pinet_fast._atomic import replacing
from pinet_fast.data import _store_checks as layout
from pinet_fast.data._sorting import EventTable, memory_bytes
from pinet_fast.data._spool import Holes, IdSpool, Spool
from pinet_fast.data.logs import LogReader, Order
from pinet_fast.data.sources import parts_of
from pinet_fast.data.store import SequenceStore, batch_of
from pinet_fast.errors import ConfigError, DataError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    OnProgress = Callable[[float, str], None]

_MAX_ITEMS = 2**31 - 2
_MAX_STEM_BYTES = 100
# Shares of the work, by time, for a log of some million events.
_READ, _SORTED, _WRITTEN = 0.45, 0.70, 0.95


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
    with _scratch(folder) as scratch:
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
        self._state = None if self._path is None else _state(self._path)
        # What a table holds is known when it was read, what a file holds before.
        self._hash = _TableHash() if self._path is None else None
        digest = None if self._path is None else _file_digest(self._path)
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
            self._hash = None if self._hash is None else _TableHash()

        def read(batch: pa.RecordBatch, share: float) -> None:
            nonlocal rows_read
            rows_read += batch.num_rows
            kinds.update({field.name: field.type for field in batch.schema})
            if self._hash is not None:
                self._hash.update(batch)
            self._report(_READ * share, f"reading {rows_read:,} events")

        table.fill(self._reader, read, begin)
        if self._path is not None and _state(self._path) != self._state:
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
            with closing(_Spools(scratch, kinds)) as spools:
                spools.fill(table, events, self._report)
                about["crc32"] = {name: spool.crc for name, spool in spools.named().items()}
                self._report(_WRITTEN, "writing the store")
                _write(self._target, spools, about)
        except OSError as error:
            raise _unwritable(self._target, error) from error
        self._report(1.0, "done")
        # Checked and summed while it was written, so its values are not read again.
        return SequenceStore.open(self._target, verify=False)

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


class _Spools:
    """The buffers of a store, each in a file."""

    def __init__(self, folder: Path, kinds: dict[str, pa.DataType]) -> None:
        self.offsets = Spool(folder / "offsets", np.int64)
        self.items = Spool(folder / "items", np.int32)
        times = kinds.get("time")
        self.times = None if times is None else Spool(folder / "times", times.to_pandas_dtype())
        self.user_ids = IdSpool(folder, "user_ids", kinds["user"])
        self.item_ids = IdSpool(folder, "item_ids", kinds["item"])

    def fill(self, table: EventTable, events: int, report: OnProgress) -> None:
        """Stream what the table holds into the files."""
        end = 0
        self.offsets.append(np.zeros(1, np.int64))
        for batch in table.users():
            self.user_ids.append(batch.column("id"))
            ends = end + np.cumsum(batch.column("n").to_numpy())
            self.offsets.append(ends)
            end = int(ends[-1]) if len(ends) else end
        self.item_ids.append(pa.array([""]) if self.item_ids.is_text else pa.array([-1]))
        for batch in table.items():
            self.item_ids.append(batch.column("id"))
        report(_READ + 0.05, f"sorting {events:,} events")
        for batch in table.sorted_events(has_times=self.times is not None):
            self.items.append(batch.column("item").to_numpy())
            if self.times is not None:
                self.times.append(batch.column("time").to_numpy())
            share = self.items.size / events
            text = f"sorted {self.items.size:,} of {events:,} events"
            report(_SORTED + (_WRITTEN - _SORTED) * share, text)

    def close(self) -> None:
        """Close the files."""
        for spool in self.named().values():
            spool.file.close()

    def named(self) -> dict[str, Spool]:
        """Return the files by the names of the checksums."""
        named = {"offsets": self.offsets, "items": self.items}
        if self.times is not None:
            named["timestamps"] = self.times
        for name, ids in (("user_ids", self.user_ids), ("item_ids", self.item_ids)):
            named |= {f"{name}.{part}": spool for part, spool in enumerate(ids.spools)}
        return named


def _write(target: Path, spools: _Spools, about: dict[str, Any]) -> None:
    batch = batch_of(
        offsets=spools.offsets.mapped,
        items=spools.items.mapped,
        timestamps=None if spools.times is None else spools.times.mapped,
        user_ids=spools.user_ids.array(),
        item_ids=spools.item_ids.array(),
    )
    schema = batch.schema.with_metadata({layout.METADATA_KEY: json.dumps(about).encode()})
    with replacing(target) as file:
        holes = Holes(file, list(spools.named().values()))
        with pa.ipc.new_file(pa.PythonFile(holes, "w"), schema) as writer:
            writer.write_batch(batch)
        holes.fill()


def _unwritable(target: Path, error: OSError) -> StoreError:
    reason = error.strerror or os.strerror(error.errno or 0)
    return StoreError(
        f"store {target}: cannot be written ({reason}); "
        "free or choose a folder with --store-dir or PINET_FAST_CACHE"
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield a folder of scratch files beside the stores; nothing is left of it.

    On the same disk as the store, since the usual folder of temporary files may be memory. Folders
    that were made for it go too, unless a store lies in them then.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".preparing-", dir=folder))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in missing:
            try:
                parent.rmdir()
            except OSError:  # a store is in it
                break


class _TableHash:
    """Content of a table, however its rows are cut into batches."""

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_large_string(column.type):
                texts = column.cast(pa.large_binary())
                lengths = np.diff(np.frombuffer(
                    texts.buffers()[1], np.int64, len(texts) + 1, 8 * texts.offset
                ))  # fmt: skip
                self._add(f"{name}.lengths", lengths.tobytes())
                data = b"".join(value.as_py() for value in texts)
                self._add(name, data)
            else:
                self._add(f"{name}.{column.type}", column.to_numpy().tobytes())

    def _add(self, name: str, data: bytes) -> None:
        self._parts.setdefault(name, hashlib.sha256()).update(data)

    def digest(self) -> Any:
        """Return a hash of all columns."""
        parts = {name: part.hexdigest() for name, part in self._parts.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode())


def _state(path: Path) -> list[tuple[str, int, int, int]]:
    states = [(part, part.stat()) for part in parts_of(path)]
    return [(str(p), s.st_ino, s.st_size, s.st_mtime_ns) for p, s in states]


def _file_digest(path: Path) -> Any:
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256")
    whole = hashlib.sha256()
    for part in parts_of(path):
        whole.update(part.relative_to(path).as_posix().encode() + b"\0")
        with part.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole
