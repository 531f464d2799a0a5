"""Options of the commands that read a log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from pinet_fast.cli.console import Output
from pinet_fast.data import SequenceStore, prepare
from pinet_fast.data.compiling import told

_COLUMNS = "Columns"
_STORE = "Store"
_FILTER = "Filter"

UserCol = Annotated[
    str, typer.Option("--user-col", help="Column of user ids.", rich_help_panel=_COLUMNS)
]
ItemCol = Annotated[
    str, typer.Option("--item-col", help="Column of item ids.", rich_help_panel=_COLUMNS)
]
TimeCol = Annotated[
    str, typer.Option("--time-col", help="Column of timestamps.", rich_help_panel=_COLUMNS)
]
Order = Annotated[
    str,
    typer.Option(
        "--order", help="auto (timestamps where there are any), timestamp, rows.",
        rich_help_panel=_COLUMNS,
    ),
]  # fmt: skip
MinUserEvents = Annotated[
    int,
    typer.Option(
        "--min-user-events", help="Drop users with fewer events.", rich_help_panel=_FILTER
    ),
]
MinItemEvents = Annotated[
    int,
    typer.Option(
        "--min-item-events", rich_help_panel=_FILTER,
        help="Drop items with fewer events; with the option above until both hold (k-core).",
    ),
]  # fmt: skip
StoreDir = Annotated[
    Path | None,
    typer.Option(
        "--store-dir", rich_help_panel=_STORE, show_default=False,
        help="Folder of stores. Default: PINET_FAST_CACHE or the cache folder.",
    ),
]  # fmt: skip
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit", rich_help_panel=_STORE, show_default=False,
        help="Most memory for sorting, such as 2GB; the rest goes to disk. Default: 80%.",
    ),
]  # fmt: skip


def prepared(log: Path, shown: Output, **options: object) -> SequenceStore:
    """Prepare a log under a progress bar on stderr."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        console=shown.err, transient=True, disable=shown.quiet or not shown.err.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("opening the log", total=1.0)

        def report(share: float, text: str) -> None:
            bar.update(task, completed=share, description=text)

        with told(shown.note):
            return prepare(log, on_progress=report, **options)  # type: ignore[arg-type] # checked there


def ties_sentence(store: SequenceStore) -> str:
    """Say how events at the same time are ordered, and how many users that concerns."""
    ties = store.time_ties
    if ties is None:
        return "no timestamps used: the order of the rows is the sequence"
    if ties == 0:
        return "sorted by time; no user's last two events tie"
    return (
        f"sorted by time, ties in the order of the rows: for {ties:,} users "
        f"({ties / store.num_users:.0%}) that order decides which event is the last"
    )
