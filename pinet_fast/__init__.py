"""Deconfounded training of sequential recommenders: one backward, S exact stratum gradients."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pinet_fast import rules
    from pinet_fast.aggregation import AggregationReport, GradientAggregator, StrataIndex, shared
    from pinet_fast.data import (
        Negatives,
        RaggedBatch,
        RaggedLoader,
        SequenceStore,
        Split,
        Strata,
        StratifiedBatchSampler,
        prepare,
    )
    from pinet_fast.heads import PluginHeads, register_head
    from pinet_fast.models import DIN, GRU4Rec, PINet, SASRec
    from pinet_fast.training import RunConfig, train

__version__ = "0.1.0"

__all__ = [
    "DIN",
    "AggregationReport",
    "GRU4Rec",
    "GradientAggregator",
    "Negatives",
    "PINet",
    "PluginHeads",
    "RaggedBatch",
    "RaggedLoader",
    "RunConfig",
    "SASRec",
    "SequenceStore",
    "Split",
    "Strata",
    "StrataIndex",
    "StratifiedBatchSampler",
    "__version__",
    "prepare",
    "register_head",
    "rules",
    "shared",
    "train",
]

# Loaded on first use: training with one's own data needs neither pyarrow nor numba.
_HOME = {
    "DIN": "models",
    "GRU4Rec": "models",
    "AggregationReport": "aggregation",
    "GradientAggregator": "aggregation",
    "Negatives": "data",
    "PINet": "models",
    "PluginHeads": "heads",
    "RaggedBatch": "data",
    "RaggedLoader": "data",
    "RunConfig": "training",
    "SASRec": "models",
    "SequenceStore": "data",
    "Split": "data",
    "Strata": "data",
    "StrataIndex": "aggregation",
    "StratifiedBatchSampler": "data",
    "prepare": "data",
    "register_head": "heads",
    "shared": "aggregation",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name == "rules":
        return importlib.import_module("pinet_fast.rules")
    if name in _HOME:
        value = getattr(importlib.import_module(f"pinet_fast.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pinet_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _find_kernels_of_a_checkout() -> None:
    """Let a bare checkout import ``pinet_fast.kernels``, which lies beside this package there."""
    here = Path(__file__).resolve().parent
    if not (here / "kernels").is_dir() and (here.parent / "kernels" / "__init__.py").is_file():
        __path__.append(str(here.parent))


_find_kernels_of_a_checkout()
