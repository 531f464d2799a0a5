"""``pinet-fast inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pinet_fast.cli import log_options as options
from pinet_fast.cli.console import Output, output
from pinet_fast.data import SequenceStore, Split, Strata
from pinet_fast.data.store import is_store
from pinet_fast.data.summary import item_counts, strata_summary, summary_of
from pinet_fast.errors import StrataError
from pinet_fast.report.activeness_plot import checked_suffix, plot_activeness


def inspect(
    log: Annotated[Path, typer.Argument(help="A log, as for prepare, or a store it wrote.")],
    strata: Annotated[
        str, typer.Option("--strata", help="Strata by activeness: head:0.2, quantile:5 or 5,20.")
    ] = "head:0.2",
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Also draw the long tails: FILE.png or FILE.svg."),
    ] = None,
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
    """Show how long the tail of a log is, its ties, and the strata it would be cut into.

    Example:
        pinet-fast inspect events.parquet --strata quantile:5 --plot tail.svg
    """
    if plot is not None:
        checked_suffix(plot)
    shown = output(as_json=as_json, quiet=quiet)
    if is_store(log):
        store = SequenceStore.open(log)
    else:
        store = options.prepared(
            log, shown, user=user_col, item=item_col, timestamp=time_col, order=order,
            min_user_events=min_user_events, min_item_events=min_item_events,
            store_dir=store_dir, memory_limit=memory_limit,
        )  # fmt: skip
    found = summary_of(store)
    cut = _cut(store, strata)
    if plot is not None:
        simulated = " - SIMULATED DATA" if store.simulated else ""
        title = f"{store.source}: {store.num_users:,} users, {store.num_items:,} items{simulated}"
        edges = () if isinstance(cut, str) else cut.edges
        activeness = Split.leave_one_out().train_lengths(store)
        plot_activeness(plot, activeness, store.lengths(), item_counts(store), edges, title)
    if as_json:
        known = None if isinstance(cut, str) else strata_summary(cut)
        found |= {"strata_spec": strata, "strata": known, "store": str(store.path)}
        found["strata_problem"] = cut if isinstance(cut, str) else None
        shown.print_json(json.dumps(found))
        return
    _print_summary(found, store, shown)
    if isinstance(cut, str):
        shown.out.print(cut, highlight=False, markup=False, soft_wrap=True)
    else:
        _print_strata(cut, shown)
    if plot is not None:
        shown.out.print(f"plot: {plot}", highlight=False, soft_wrap=True)


def _cut(store: SequenceStore, spec: str) -> Strata | str:
    """Return the strata; or, where the log has none by the spec's default, the reason why."""
    try:
        return Strata.by_activeness(store, split=Split.leave_one_out(), edges=spec)
    except StrataError as error:
        if spec == "head:0.2":  # not asked for: what can be shown is shown
            return f"no strata: {error}"
        raise


def _print_summary(found: dict[str, Any], store: SequenceStore, shown: Output) -> None:
    per_user = found["events_per_user"]
    simulated = " - SIMULATED DATA" if found["simulated"] else ""
    table = Table(title=f"{found['source']}{simulated}", show_header=False, title_justify="left")
    table.add_column("what", style="dim", no_wrap=True)
    table.add_column("value", overflow="fold")
    quartiles = " / ".join(f"{per_user[name]:,g}" for name in ("q25", "q50", "q75"))
    rows = [
        ("users", f"{found['users']:,}"),
        ("items", f"{found['items']:,}"),
        ("events", f"{found['events']:,}"),
        ("rows dropped by filters", f"{found['rows_dropped']:,}"),
        ("events per user", f"mean {per_user['mean']:.2f}, min {per_user['min']:,}, "
         f"quartiles {quartiles}"),
        ("", f"p90 {per_user['p90']:,g}, p99 {per_user['p99']:,g}, max {per_user['max']:,}"),
        ("Gini of users", f"{found['gini_users']:.3f}"),
        ("events of the top 20% of users", f"{found['top_share_users']:.1%}"),
        ("events of the top 20% of items", f"{found['top_share_items']:.1%}"),
        ("users with fewer than 3 events", f"{found['users_below_3_events']:,} (train only)"),
        ("rows that repeat a (user, item)", f"{found['repeated_pairs']:,}"),
        ("order", options.ties_sentence(store)),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    shown.out.print(table)


def _print_strata(strata: Strata, shown: Output) -> None:
    table = Table(title=f"strata by training events, {strata.spec}", title_justify="left")
    table.add_column("stratum")
    for column in ("training events", "users", "share", "events", "share", "tied at the border"):
        table.add_column(column, justify="right")
    for row in strata_summary(strata):
        tied = row["border_ties"]
        table.add_row(
            row["name"], f"{row['min_activeness']:,}-{row['max_activeness']:,}",
            f"{row['users']:,}", f"{row['user_share']:.1%}", f"{row['events']:,}",
            f"{row['event_share']:.1%}", "" if tied is None else f"{tied:,}",
        )  # fmt: skip
    shown.out.print(table)
    shown.out.print(
        "tied at the border: users with the most events below it; they are never parted",
        style="dim", highlight=False,
    )  # fmt: skip
