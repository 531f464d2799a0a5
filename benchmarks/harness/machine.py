"""What a figure needs beside it: the machine, the versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "numba", "pyarrow", "torchjd", "opacus")


def describe() -> dict[str, Any]:
    """Return the device and how busy it was."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{_cpu_name()}, {cores} cores",
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def processor() -> str:
    """Return the processor and the instructions that torch uses of it: ratios differ by both.

    With its family, as clouds call several generations by one name: two of AMD's with AVX-512
    differ by twice in what a core computes with it.
    """
    import torch

    family = _cpu_field("cpu family")
    named = _cpu_name() + (f", family {family}" if family else "")
    return f"{named}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str | None:
    """Return what Linux says of the first processor, or None."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith(name)]
    return found[0] if found else None


def versions() -> dict[str, str | None]:
    """Return the versions of Python, pinet_fast and what it runs on."""
    import pinet_fast

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "pinet_fast": pinet_fast.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> dict[str, Any]:
    """Return the commit of the checkout, and whether anything but results differs from it."""
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!*.md")
    return {"id": head or None, "dirty": bool(changed)}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""  # no git, or an unpacked archive
    return done.stdout.strip()
