"""The compiled module of the aggregation, ``csrc/``: loaded once, and asked for at every step.

It is for the versions of torch and Python that it was built with. Where it is not there, or
``PINET_FAST_LANE=0`` turns it off, Python does the same, with the same bits.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from pinet_fast import _env


@functools.cache
def load() -> tuple[Any, str | None]:
    """Return the module, or None and the reason why there is none."""
    version = "_".join(torch.__version__.split(".")[:2])
    try:
        return importlib.import_module(f"pinet_fast._lane_{version}"), None
    except ImportError as error:
        return None, f"not built for this torch and Python ({error}); run make install again"


def functions() -> Any:
    """Return the module, or None where Python is to do its work."""
    return load()[0] if _env.lane_enabled() else None
