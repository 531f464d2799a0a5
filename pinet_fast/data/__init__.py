"""Logs, memory-mapped stores, splits, strata, and stratified ragged batches."""

from __future__ import annotations

from pinet_fast.data import compiling as compiling  # registers itself with Numba
from pinet_fast.data._popularity import training_counts
from pinet_fast.data.attributes import item_attributes
from pinet_fast.data.augment import Crop, Drop, Mask, Reorder
from pinet_fast.data.batch import RaggedBatch
from pinet_fast.data.evaluation import EvaluationBatch, evaluation_batches
from pinet_fast.data.ids import StringIds
from pinet_fast.data.loader import RaggedLoader
from pinet_fast.data.loader_stats import LoaderStats
from pinet_fast.data.logs import EventLog, read_log
from pinet_fast.data.negatives import BoundNegatives, FrozenNegatives, Negatives
from pinet_fast.data.preparation import prepare
from pinet_fast.data.sampler import StratifiedBatchSampler
from pinet_fast.data.simulate import simulate_log
from pinet_fast.data.splits import Split
from pinet_fast.data.store import SequenceStore
from pinet_fast.data.strata import Strata

__all__ = [
    "BoundNegatives",
    "Crop",
    "Drop",
    "EvaluationBatch",
    "EventLog",
    "FrozenNegatives",
    "LoaderStats",
    "Mask",
    "Negatives",
    "RaggedBatch",
    "RaggedLoader",
    "Reorder",
    "SequenceStore",
    "Split",
    "Strata",
    "StratifiedBatchSampler",
    "StringIds",
    "evaluation_batches",
    "item_attributes",
    "prepare",
    "read_log",
    "simulate_log",
    "training_counts",
]
