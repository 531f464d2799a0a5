"""The only reader of environment variables, and their only writer."""

from __future__ import annotations

import os
from pathlib import Path

BACKEND = "PINET_FAST_BACKEND"
"""Forces one kernel backend everywhere: ``reference``, ``cpp`` or ``triton``."""

NVTX = "PINET_FAST_NVTX"
"""``1`` turns NVTX ranges on."""

LANE = "PINET_FAST_LANE"
"""``0`` turns the compiled lane of the interception off."""

CACHE = "PINET_FAST_CACHE"
"""Folder of prepared stores; default ``$XDG_CACHE_HOME/pinet_fast`` or ``~/.cache/pinet_fast``."""


_RAW: dict[bytes, bytes] | None = getattr(os.environ, "_data", None) if os.name == "posix" else None
_RAW_BACKEND, _RAW_LANE = os.fsencode(BACKEND), os.fsencode(LANE)


def forced_backend() -> str | None:
    """Return the backend forced by ``PINET_FAST_BACKEND``, or None.

    Every call of every op asks. Most find nothing, which the mapping below ``os.environ`` says
    without the four Python calls that encode and decode a name.
    """
    if _RAW is not None and _RAW_BACKEND not in _RAW:
        return None
    return os.environ.get(BACKEND) or None


def lane_enabled() -> bool:
    """Return whether ``PINET_FAST_LANE`` leaves the lane on."""
    if _RAW is not None and _RAW_LANE not in _RAW:
        return True
    return os.environ.get(LANE) != "0"


def nvtx_enabled() -> bool:
    """Return whether ``PINET_FAST_NVTX`` asks for NVTX ranges."""
    return os.environ.get(NVTX, "0") not in ("", "0")


def under_nsys() -> bool:
    """Return whether Nsight Systems started this process."""
    return bool(os.environ.get("NSYS_PROFILING_SESSION_ID"))


def triton_interpreted() -> bool:
    """Return whether Triton's own ``TRITON_INTERPRET`` runs its kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def hush_profiler() -> None:
    """Keep torch's profiler from writing to stderr that it starts and stops.

    ``KINETO_LOG_LEVEL`` is its own variable: what a user has set stays.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def cache_dir() -> Path:
    """Return the folder of prepared stores, which need not exist yet."""
    if own := os.environ.get(CACHE):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pinet_fast"
