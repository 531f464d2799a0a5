"""``pinet-fast fetch``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pinet_fast.cli.console import Output, output
from pinet_fast.data.datasets import DATASETS
from pinet_fast.data.datasets import fetch as download

_CHECKSUMS = {
    "pinned": "the pinned one",
    "recorded": "not pinned; the same as at the first download",
    "first": "not pinned: trusted on first use, and recorded beside the download to compare later",
}


def fetch(
    name: Annotated[
        str | None, typer.Argument(help="A public log; without a name they are listed.")
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where to put it.")] = Path("data"),
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="You have read its licence and agree.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Download a public log under its licence and write it as Parquet; broken off, it goes on.

    Example:
        pinet-fast fetch ml-100k --accept-licence
    """
    shown = output(as_json=as_json, quiet=quiet)
    if name is None:
        _list(shown, as_json)
        return
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        console=shown.err, transient=True, disable=quiet or not shown.err.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(name, total=1.0)

        def report(share: float, text: str) -> None:
            bar.update(task, completed=share, description=text)

        found = download(name, folder, accept_licence=accept_licence, on_progress=report)
    licence = DATASETS[name].licence
    if as_json:
        about = {
            "name": name,
            "log": str(found.log),
            "download": str(found.download),
            "sha256": found.sha256,
            "pinned": found.pinned,
            "checksum": found.known,
            "licence": licence,
        }
        shown.print_json(json.dumps(about))
        return
    for line in (
        f"licence: {licence}",
        f"sha256: {found.sha256} ({_CHECKSUMS[found.known]})",
        f"log: {found.log}",
        f"next: pinet-fast inspect {found.log}",
    ):
        shown.out.print(line, highlight=False, markup=False, soft_wrap=True)


def _list(shown: Output, as_json: bool) -> None:
    if as_json:
        known = {
            name: {"url": d.url, "sha256": d.sha256, "licence": d.licence}
            for name, d in DATASETS.items()
        }
        shown.print_json(json.dumps(known))
        return
    table = Table(title="public logs", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("checksum", no_wrap=True)
    table.add_column("from", overflow="fold")
    for name, d in DATASETS.items():
        table.add_row(name, "pinned" if d.sha256 else "first use", d.url)
    shown.out.print(table)
    shown.out.print(
        "checksum: pinned, or, at first use, that of the first download is recorded beside it and "
        "later downloads must have it too", style="dim", highlight=False,
    )  # fmt: skip
    for licence in dict.fromkeys(d.licence for d in DATASETS.values()):
        names = ", ".join(name for name, d in DATASETS.items() if d.licence == licence)
        shown.out.print(f"{names}: {licence}", highlight=False, markup=False)
