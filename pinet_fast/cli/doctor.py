"""``pinet-fast doctor``."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.table import Table

import pinet_fast
from pinet_fast.aggregation.lane import refusal
from pinet_fast.cli.console import Output, output
from pinet_fast.data.floor import GatherSpeed, MemoryFloor
from pinet_fast.kernels import backend_status

_PACKAGES = ("torch", "triton", "numpy", "numba", "pyarrow", "duckdb", "nvtx")
_LENGTHS = (30, 200)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show versions, kernel backends and why one is off, and how fast memory is here.

    Example:
        pinet-fast doctor
    """
    shown = output(as_json=as_json)
    found = _found()
    if as_json:
        shown.print_json(json.dumps(found))
    else:
        _print(found, shown)


def _found() -> dict[str, Any]:
    import torch

    floor = MemoryFloor.measure()
    gather = GatherSpeed.measure(floor)
    gpu = torch.cuda.is_available()
    return {
        "versions": {
            "pinet_fast": pinet_fast.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "backends": {
            name: {"serves": reason is None, "reason": reason}
            for name, reason in backend_status().items()
        },
        "lane": {"serves": refusal() is None, "reason": refusal()},
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "copy_gb_per_s": floor.copy_rate / 1e9,
        "random_line_ns": floor.line_seconds * 1e9,
        "sampler_eta": gather.eta,
        "sampler_ns_per_row": gather.row_seconds * 1e9,
        "sampler_events_per_row": gather.mean_events,
        "floor_ns_per_row": {n: floor.seconds(1, n) * 1e9 for n in _LENGTHS},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _print(found: dict[str, Any], shown: Output) -> None:
    versions = found["versions"]
    table = Table(show_header=False)
    table.add_column("what", style="dim", no_wrap=True)
    table.add_column("value", overflow="fold")
    own = f"{versions['pinet_fast']} on Python {versions['python']}"
    table.add_row("pinet_fast", own)
    others = ", ".join(f"{name} {versions[name] or 'missing'}" for name in _PACKAGES)
    table.add_row("packages", others)
    for name, state in found["backends"].items():
        table.add_row(f"backend {name}", "serves" if state["serves"] else f"off: {state['reason']}")
    lane = found["lane"]
    table.add_row("compiled lane", "serves" if lane["serves"] else f"off: {lane['reason']}")
    table.add_row("GPU", found["gpu"] or "none that torch can use")
    table.add_row("threads", f"{found['cpu_count']} cores, torch uses {found['torch_threads']}")
    table.add_row("copy bandwidth", f"{found['copy_gb_per_s']:.1f} GB/s, one thread, cold values")
    table.add_row("random cache line", f"{found['random_line_ns']:.1f} ns")
    for events, floor in found["floor_ns_per_row"].items():
        rate = 1e3 / floor
        table.add_row(
            f"sampler floor, {events} events",
            f"{floor:.0f} ns a row = {rate:.1f} M rows/s and {rate * events:,.0f} M events/s; "
            "no gather on one thread is faster",
        )
    table.add_row(
        "sampler measured",
        f"eta {found['sampler_eta']:.2f}: {found['sampler_ns_per_row']:.0f} ns a row of "
        f"{found['sampler_events_per_row']:.0f} events, one thread; 1 would be the floor",
    )
    shown.out.print(table)
