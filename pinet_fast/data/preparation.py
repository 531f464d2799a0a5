"""Decodes a log once into a store; the same log and options find it again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pinet_fast import _env
from pinet_fast._atomic import replacing
from pinet_fast.data import store as layout
from pinet_fast.data.logs import EventLog, Order, checked_log_path, read_log
from pinet_fast.data.store import SequenceStore
from pinet_fast.errors import DataError, StoreError

_MAX_ITEMS = 2**31 - 2
_MAX_STEM_BYTES = 100


def prepare(
    log_path: str | Path,
    *,
    store_dir: str | Path | None = None,
    user: str = "user",
    item: str = "item",
    timestamp: str = "timestamp",
    order: Order = "auto",
) -> SequenceStore:
    """Return the store of a log, written at the first call and found again by later ones.

    Users are sorted by id. Inside a user events are sorted by time, and events at the same time
    keep the order of the rows; without times the order of the rows is the sequence. A store that
    is there but damaged is written again.

    Args:
        log_path: A ``.parquet`` or ``.csv`` log.
        store_dir: Folder of stores, made if need be; default ``stores`` in the cache folder
            (``PINET_FAST_CACHE``).
        user: Column of the user ids.
        item: Column of the item ids.
        timestamp: Column of the times.
        order: ``"auto"``, ``"timestamp"`` or ``"rows"``, as for ``read_log``.

    Returns:
        The store, memory-mapped.

    Raises:
        DataError: The log cannot be read or used, or changed while it was read.
        StoreError: The store cannot be written.
        ConfigError: ``order`` is none of the three.
    """
    source = checked_log_path(log_path)
    before = _state(source)
    options = {"user": user, "item": item, "timestamp": timestamp, "order": order}
    fingerprint = _fingerprint(source, options)
    folder = _env.cache_dir() / "stores" if store_dir is None else Path(store_dir)
    stem = source.stem.encode()[:_MAX_STEM_BYTES].decode(errors="ignore")
    target = folder / f"{stem}-{fingerprint[:16]}.arrow"
    if target.is_file():
        try:
            found = SequenceStore.open(target)
            if found.fingerprint == fingerprint:
                return found
        except StoreError:
            pass  # damaged, or of an older format: written again below
    log = read_log(source, user=user, item=item, timestamp=timestamp, order=order)
    if _state(source) != before:
        raise DataError(
            f"log {source}: it changed while it was read; prepare it again when written"
        )
    _write(target, _grouped(log), log, fingerprint)
    return SequenceStore.open(target)


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _fingerprint(path: Path, options: dict[str, str]) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps({"format": layout.FORMAT, **options}, sort_keys=True).encode())
    return digest.hexdigest()


def _grouped(log: EventLog) -> dict[str, Any]:
    if log.timestamps is None:
        by_user = np.argsort(log.users, kind="stable")
    else:
        by_user = np.lexsort((log.timestamps, log.users))  # stable: ties keep the order of rows
    users = log.users[by_user]
    firsts = np.flatnonzero(np.concatenate(([True], users[1:] != users[:-1])))
    item_ids, codes = np.unique(log.items, return_inverse=True)
    if len(item_ids) > _MAX_ITEMS:
        raise DataError(f"log {log.path}: expected at most {_MAX_ITEMS:,} items, got more")
    return {
        "offsets": np.append(firsts, len(users)).astype(np.int64),
        "items": (codes[by_user] + 1).astype(np.int32),
        "timestamps": None if log.timestamps is None else log.timestamps[by_user],
        "user_ids": users[firsts],
        "item_ids": np.concatenate(([-1], item_ids)).astype(np.int64),
    }


def _write(target: Path, arrays: dict[str, Any], log: EventLog, fingerprint: str) -> None:
    about = {
        "format": layout.FORMAT,
        "fingerprint": fingerprint,
        "source": log.path.name,
        "simulated": log.simulated,
        "num_users": len(arrays["user_ids"]),
        "num_items": len(arrays["item_ids"]) - 1,
        "num_events": len(arrays["items"]),
        "crc32": layout.checksum(list(arrays.values())),
    }
    batch = layout.batch_of(**arrays)
    schema = batch.schema.with_metadata({layout.METADATA_KEY: json.dumps(about).encode()})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch)
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise StoreError(
            f"store {target}: cannot be written ({reason}); "
            "free or choose a folder with --store-dir or PINET_FAST_CACHE"
        ) from error
