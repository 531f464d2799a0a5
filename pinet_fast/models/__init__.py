"""Reference models, native on ragged batches."""

from __future__ import annotations

from pinet_fast.models.pinet import Backbone, PINet
from pinet_fast.models.sasrec import SASRec

__all__ = ["Backbone", "PINet", "SASRec"]
