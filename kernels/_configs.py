"""Launch configs of the Triton kernels: checked-in tables, so that every run has the same bits.

A table ``configs/<op>.json`` is a list of entries: ``arch``, ``dtype`` (either may be ``any``),
``bucket`` (a range of shapes, named by the op), ``config``, and ``source``, which says how it was
found. ``python -m benchmarks.tune`` writes entries for the GPU it runs on.
"""

from __future__ import annotations

import functools
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).resolve().parent / "configs"
_tried: dict[tuple[str, str], dict[str, int]] = {}


def lookup(op: str, device: torch.device, dtype: str, bucket: str) -> dict[str, int]:
    """Return the launch config of an op: names of compile-time arguments, ``num_warps`` and such.

    Args:
        op: Name of the table.
        device: Where the tensors are; a device other than CUDA has no entries of its own.
        dtype: Name of the dtype, with the precision of products after a colon where there is one.
        bucket: The op's own name for a range of shapes.

    Raises:
        KeyError: The table has no entry that holds.
    """
    return dict(_tried.get((op, bucket)) or of_arch(op, arch_of(device), dtype, bucket))


@contextmanager
def trying(op: str, bucket: str, config: dict[str, int]) -> Iterator[None]:
    """Use a config whatever the table says: how the tuner compares candidates."""
    _tried[op, bucket] = config
    try:
        yield
    finally:
        del _tried[op, bucket]


def arch_of(device: torch.device) -> str:
    """Return ``sm_90`` for example, or ``any`` where kernels are interpreted."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def table(op: str) -> tuple[dict[str, Any], ...]:
    """Return the entries of an op's table: arch, dtype, bucket, config, source."""
    return tuple(json.loads((FOLDER / f"{op}.json").read_text()))


def tables() -> list[str]:
    """Return the ops that have a table."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@functools.cache
def of_arch(op: str, arch: str, dtype: str, bucket: str) -> dict[str, int]:
    """Return the config that holds for an architecture, ``sm_90`` for example; see ``lookup``."""
    for key in ((arch, dtype), ("any", dtype), ("any", "any")):
        for entry in table(op):
            if (entry["arch"], entry["dtype"]) == key and entry["bucket"] == bucket:
                config: dict[str, int] = entry["config"]
                return config
    raise KeyError(f"configs/{op}.json has no entry for {arch}, {dtype}, {bucket}")
