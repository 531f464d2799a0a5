"""Plugin heads: what each stratum adds to the shared backbone."""

from __future__ import annotations

from pinet_fast.heads.base import Heads, head_names, make_heads, register_head
from pinet_fast.heads.gate import GatedHeads
from pinet_fast.heads.plugin import PluginHeads
from pinet_fast.heads.prediction import PredictionHeads

register_head("plugin", PluginHeads)
register_head("prediction", PredictionHeads)
register_head("gate", GatedHeads)

__all__ = [
    "GatedHeads",
    "Heads",
    "PluginHeads",
    "PredictionHeads",
    "head_names",
    "make_heads",
    "register_head",
]
