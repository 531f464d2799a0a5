"""Writes a store buffer by buffer, in a folder of scratch files beside it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pinet_fast._atomic import replacing
from pinet_fast.data import _store_checks as layout
from pinet_fast.data._histories import histories_of
from pinet_fast.data._spool import Holes, IdSpool, Spool
from pinet_fast.data.store import batch_of
from pinet_fast.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pinet_fast.data._sorting import EventTable

_SORTING = 0.5  # share of the filling at which the first sorted events come, at most
_SORTED = 0.8  # share of the filling after which the histories come


class StoreSpools:
    """The buffers of a store, each in a file."""

    def __init__(self, folder: Path, kinds: dict[str, pa.DataType]) -> None:
        self.offsets = Spool(folder / "offsets", np.int64)
        self.items = Spool(folder / "items", np.int32)
        times = kinds.get("time")
        self.times = None if times is None else Spool(folder / "times", times.to_pandas_dtype())
        self.user_ids = IdSpool(folder, "user_ids", kinds["user"])
        self.item_ids = IdSpool(folder, "item_ids", kinds["item"])
        self.history_offsets = Spool(folder / "history_offsets", np.int64)
        self.history_items = Spool(folder / "history_items", np.int32)
        self.history_firsts = Spool(folder / "history_firsts", np.int32)

    def fill(self, table: EventTable, events: int, report: Callable[[float, str], None]) -> None:
        """Stream what the table holds into the files; ``report`` gets shares of this work."""
        end = 0
        self.offsets.append(np.zeros(1, np.int64))
        for batch in table.users():
            self.user_ids.append(batch.column("id"))
            ends = end + np.cumsum(batch.column("n").to_numpy())
            self.offsets.append(ends)
            end = int(ends[-1]) if len(ends) else end
        self.item_ids.append(self.item_ids.padding)
        for batch in table.items():
            self.item_ids.append(batch.column("id"))
        self._fill_events(table, events, report)
        self._fill_histories(report)

    def _fill_events(
        self, table: EventTable, events: int, report: Callable[[float, str], None]
    ) -> None:
        done = 0.0

        def sorting(share: float) -> None:
            nonlocal done
            done = max(done, min(_SORTING, _SORTED * share))
            report(done, f"sorting {events:,} events")

        sorting(0.0)
        for batch in table.sorted_events(self.times is not None, sorting):
            self.items.append(batch.column("item").to_numpy())
            if self.times is not None:
                self.times.append(batch.column("time").to_numpy())
            share = self.items.size / events
            text = f"sorted {self.items.size:,} of {events:,} events"
            report(done + (_SORTED - done) * share, text)

    def _fill_histories(self, report: Callable[[float, str], None]) -> None:
        items, offsets = self.items.mapped, self.offsets.mapped
        self.history_offsets.append(np.zeros(1, np.int64))
        users = 0
        for lengths, found, places in histories_of(items, offsets):
            self.history_offsets.append(self.history_items.size + np.cumsum(lengths))
            self.history_items.append(found)
            self.history_firsts.append(places)
            users += len(lengths)
            share = offsets[users] / len(items)
            report(_SORTED + (1 - _SORTED) * share, f"sorted the histories of {users:,} users")

    def close(self) -> None:
        """Close the files."""
        for spool in self.named().values():
            spool.file.close()

    def named(self) -> dict[str, Spool]:
        """Return the files by the names of the checksums."""
        named = {"offsets": self.offsets, "items": self.items}
        if self.times is not None:
            named["timestamps"] = self.times
        named["history_offsets"] = self.history_offsets
        named |= {"history_items": self.history_items, "history_firsts": self.history_firsts}
        for name, ids in (("user_ids", self.user_ids), ("item_ids", self.item_ids)):
            named |= {f"{name}.{part}": spool for part, spool in enumerate(ids.spools)}
        return named


def write_store(target: Path, spools: StoreSpools, about: dict[str, Any]) -> None:
    """Write a store from its buffers, whole or not at all.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    batch = batch_of(
        offsets=spools.offsets.mapped,
        items=spools.items.mapped,
        timestamps=None if spools.times is None else spools.times.mapped,
        user_ids=spools.user_ids.array(),
        item_ids=spools.item_ids.array(),
        history_offsets=spools.history_offsets.mapped,
        history_items=spools.history_items.mapped,
        history_firsts=spools.history_firsts.mapped,
    )
    schema = batch.schema.with_metadata({layout.METADATA_KEY: json.dumps(about).encode()})
    with replacing(target) as file:
        holes = Holes(file, list(spools.named().values()))
        with pa.ipc.new_file(pa.PythonFile(holes, "w"), schema) as writer:
            writer.write_batch(batch)
        holes.fill()


def unwritable(target: Path, error: OSError) -> StoreError:
    """Return the error for a store that cannot be written."""
    reason = error.strerror or os.strerror(error.errno or 0)
    return StoreError(
        f"store {target}: cannot be written ({reason}); "
        "free or choose a folder with --store-dir or PINET_FAST_CACHE"
    )


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder of scratch files beside the stores; nothing is left of it.

    On the same disk as the store, since the usual folder of temporary files may be memory. Folders
    that were made for it go too, unless a store lies in them then.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".preparing-", dir=folder))
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in missing:
            try:
                parent.rmdir()
            except OSError:  # a store is in it
                break
