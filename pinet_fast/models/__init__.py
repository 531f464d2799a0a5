"""Reference models, native on ragged batches."""

from __future__ import annotations

from pinet_fast.models.din import DIN
from pinet_fast.models.gru4rec import GRU4Rec
from pinet_fast.models.pinet import Backbone, PINet
from pinet_fast.models.sasrec import SASRec
from pinet_fast.models.sequence import SequenceModel

__all__ = ["DIN", "Backbone", "GRU4Rec", "PINet", "SASRec", "SequenceModel"]
