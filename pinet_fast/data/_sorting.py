"""Groups and sorts the events of a log out of core, in a DuckDB database on disk."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from pinet_fast.data.sources import ROWS, Retype
from pinet_fast.errors import ConfigError, DataError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pinet_fast.data.logs import LogReader

T = TypeVar("T")

_TELL_SECONDS = 0.2
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_MIN_MEMORY = 50 * 10**6
_BYTES_PER_THREAD = 64 * 10**6


def memory_bytes(limit: str | None) -> int | None:
    """Return a limit such as ``"2GB"`` in bytes.

    Raises:
        ConfigError: It is no size, or less than 50MB.
    """
    if limit is None:
        return None
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", limit.upper())
    size = int(float(parts[1]) * _UNITS[parts[2]]) if parts else 0
    if size < _MIN_MEMORY:
        raise ConfigError(
            f"--memory-limit {limit}: expected a size of at least 50MB; for instance 500MB or 2GB"
        )
    return size


class EventTable:
    """The events of a log in a database of its own.

    Columns are user, item, maybe time, and row, the number of the event in the log, which keeps
    the order where times tie.

    Args:
        folder: An empty folder for the database and for what does not fit in memory.
        memory_limit: Most bytes that DuckDB holds; None lets DuckDB choose.
    """

    def __init__(self, folder: Path, memory_limit: int | None) -> None:
        import duckdb  # 0.1 s, and needed here only

        self._errors: type[Exception] = duckdb.Error
        self._out_of_memory: type[Exception] = duckdb.OutOfMemoryException
        self._folder = folder
        settings: dict[str, Any] = {
            "temp_directory": str(folder / "spill"),
            "preserve_insertion_order": False,  # rows are numbered instead
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        if memory_limit is not None:
            settings["memory_limit"] = f"{memory_limit // 1000}KB"
            most = max(1, memory_limit // _BYTES_PER_THREAD)
            settings["threads"] = min(os.cpu_count() or 1, most)
        with self._explained():
            self._base = duckdb.connect(str(folder / "events.duckdb"), config=settings)
            # Without it nothing is counted; printed, it would go to stdout.
            self._base.execute("SET enable_progress_bar = true").fetchall()
            self._base.execute("SET enable_progress_bar_print = false").fetchall()

    def close(self) -> None:
        """Close the database; its files may be deleted then."""
        self._base.close()

    def fill(
        self,
        reader: LogReader,
        on_batch: Callable[[pa.RecordBatch, float], None],
        on_restart: Callable[[], None],
    ) -> None:
        """Store the events of a log.

        Args:
            reader: The log.
            on_batch: Called with every batch and the share of the log read by then.
            on_restart: Called when the batches so far are void and come again.

        Raises:
            DataError: The log cannot be used.
        """
        while True:
            on_restart()
            try:
                self._fill_once(reader, on_batch)
            except Retype:
                continue
            return

    def _fill_once(
        self, reader: LogReader, on_batch: Callable[[pa.RecordBatch, float], None]
    ) -> None:
        # DuckDB reports an error in the stream as text; the error itself is kept here.
        failures: list[BaseException] = []
        batches = _numbered(reader, on_batch)
        try:
            first = next(batches)
        except StopIteration:  # cannot be: an empty log is refused
            raise DataError(f"{reader.source.label}: no events; give another log") from None

        def stream() -> Iterator[pa.RecordBatch]:
            try:
                yield first
                yield from batches
            except BaseException as error:
                failures.append(error)
                raise

        with self._explained(failures):
            self._run("DROP TABLE IF EXISTS events")
            arrow = pa.RecordBatchReader.from_batches(first.schema, stream())
            self._base.register("log", arrow)
            try:
                self._base.execute("CREATE TABLE events AS SELECT * FROM log").fetchall()
            finally:
                self._base.unregister("log")

    def number(self, min_user_events: int, min_item_events: int) -> tuple[int, int, int]:
        """Number the users and items that stay: ascending, users from 0 and items from 1.

        Users and items with too few events are dropped, over and over until none is left to drop
        (the k-core).

        Args:
            min_user_events: Least events of a user.
            min_item_events: Least events of an item.

        Returns:
            Users, items and events that stay.
        """
        run = self._run
        kept = "CREATE OR REPLACE TABLE {0} AS SELECT {1}, count(*) AS n FROM events {2} GROUP BY 1"
        users = kept.format("users", '"user"', "{}") + f" HAVING count(*) >= {min_user_events}"
        items = kept.format("items", "item", "{}") + f" HAVING count(*) >= {min_item_events}"
        size = "SELECT count(*), coalesce(sum(n), 0) FROM users"
        run(users.format(""))
        if max(min_user_events, min_item_events) <= 1:
            run(items.format(""))
        else:
            before, now = None, run(size)
            while before != now:
                run(items.format('SEMI JOIN users USING ("user")'))
                run(users.format("SEMI JOIN items USING (item)"))
                before, now = now, run(size)
        run('CREATE TABLE user_codes AS SELECT "user", n, '
            'row_number() OVER (ORDER BY "user") - 1 AS code FROM users')  # fmt: skip
        run("CREATE TABLE item_codes AS SELECT item, row_number() OVER (ORDER BY item) AS code "
            "FROM items")  # fmt: skip
        num_users, num_events = run(size)
        return int(num_users), int(run("SELECT count(*) FROM items")[0]), int(num_events)

    def users(self) -> Iterator[pa.RecordBatch]:
        """Yield (id, events) of every user by code."""
        return self._stream('SELECT "user" AS id, n FROM user_codes ORDER BY code')

    def items(self) -> Iterator[pa.RecordBatch]:
        """Yield (id) of every item by code."""
        return self._stream("SELECT item AS id FROM item_codes ORDER BY code")

    def sorted_events(
        self, has_times: bool, on_progress: Callable[[float], None]
    ) -> Iterator[pa.RecordBatch]:
        """Yield (item code, time if there are times), sorted by user, time and row.

        Args:
            has_times: Whether there are times.
            on_progress: Called until the first batch comes, with the share of the query that is
                done by then; it need not reach 1.
        """
        what, by = (', "time"', ', "time"') if has_times else ("", "")
        batches = self._stream(
            f"SELECT item_codes.code::INTEGER AS item{what} FROM events "
            'JOIN user_codes USING ("user") JOIN item_codes USING (item) '
            f'ORDER BY user_codes.code{by}, "row"'
        )
        first = self._waited(lambda: next(batches, None), on_progress)
        if first is not None:
            yield first
            yield from batches

    def _waited(self, work: Callable[[], T], on_progress: Callable[[float], None]) -> T:
        """Do work in a thread; meanwhile tell how far it is, and stop it if that raises."""
        with ThreadPoolExecutor(1, "pinet-sort") as pool:
            future = pool.submit(work)
            try:
                while not wait([future], timeout=_TELL_SECONDS).done:
                    on_progress(min(max(self._base.query_progress() / 100, 0.0), 1.0))
            except BaseException:
                self._base.interrupt()
                raise
            return future.result()

    def _run(self, query: str) -> tuple[Any, ...]:
        with self._explained():
            rows: list[tuple[Any, ...]] = self._base.execute(query).fetchall()
        return rows[0] if rows else ()

    def _stream(self, query: str) -> Iterator[pa.RecordBatch]:
        with self._explained():  # not execute(), which keeps the whole result in memory
            yield from self._base.sql(query).to_arrow_reader(ROWS)

    @contextmanager
    def _explained(self, failures: list[BaseException] | None = None) -> Iterator[None]:
        try:
            yield
        except (self._errors, pa.ArrowException) as error:
            if failures:
                raise failures[0] from None
            said = " ".join(str(error).split())[:200]
            if isinstance(error, self._out_of_memory) or "Out of Memory" in said:
                raise DataError(
                    f"log: sorting needs more memory ({said}); raise --memory-limit"
                ) from error
            raise StoreError(
                f"store {self._folder.parent}: sorting failed there ({said}); free the disk, or "
                "choose another folder with --store-dir"
            ) from error


def _numbered(
    reader: LogReader, on_batch: Callable[[pa.RecordBatch, float], None]
) -> Iterator[pa.RecordBatch]:
    base = 0
    for batch, share in reader.batches():
        on_batch(batch, share)
        rows = pa.array(np.arange(base, base + batch.num_rows))
        base += batch.num_rows
        yield batch.append_column("row", rows)
