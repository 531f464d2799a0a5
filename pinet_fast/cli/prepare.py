"""``pinet-fast prepare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pinet_fast.cli import log_options as options
from pinet_fast.cli.console import output


def prepare(
    log: Annotated[
        Path,
        typer.Argument(
            help="Log: .parquet, .csv, .jsonl, .ndjson, .arrow, .feather, or a folder of .parquet."
        ),
    ],
    user_col: options.UserCol = "user",
    item_col: options.ItemCol = "item",
    time_col: options.TimeCol = "timestamp",
    order: options.Order = "auto",
    min_user_events: options.MinUserEvents = 1,
    min_item_events: options.MinItemEvents = 1,
    store_dir: options.StoreDir = None,
    memory_limit: options.MemoryLimit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Turn a log into a memory-mapped store, once; logs larger than memory are sorted on disk.

    Example:
        pinet-fast prepare events.parquet --min-user-events 5 --min-item-events 5
    """
    shown = output(as_json=as_json, quiet=quiet)
    store = options.prepared(
        log, shown, user=user_col, item=item_col, timestamp=time_col, order=order,
        min_user_events=min_user_events, min_item_events=min_item_events,
        store_dir=store_dir, memory_limit=memory_limit,
    )  # fmt: skip
    if as_json:
        about = {
            "store": str(store.path),
            "fingerprint": store.fingerprint,
            "source": store.source,
            "simulated": store.simulated,
            "users": store.num_users,
            "items": store.num_items,
            "events": store.num_events,
            "rows_dropped": store.rows_dropped,
            "time_ties": store.time_ties,
            "bytes": store.path.stat().st_size,
        }
        shown.print_json(json.dumps(about))
        return
    lines = [
        f"{store.source}{' - SIMULATED DATA' if store.simulated else ''}",
        f"  {store.num_users:,} users, {store.num_items:,} items, {store.num_events:,} events",
    ]
    if store.rows_dropped:
        lines.append(
            f"  {store.rows_dropped:,} rows dropped: users with fewer than "
            f"{store.min_user_events} or items with fewer than {store.min_item_events} events"
        )
    lines.append(f"  {options.ties_sentence(store)}")
    lines.append(f"store: {store.path} ({store.path.stat().st_size / 1e6:,.1f} MB)")
    for line in lines:
        shown.out.print(line, highlight=False, markup=False, soft_wrap=True)
