"""The training recipe: two stages, evaluation by stratum, run folders."""

from __future__ import annotations

from pinet_fast.training.config import RunConfig
from pinet_fast.training.observer import Observer
from pinet_fast.training.recipe import train

__all__ = ["Observer", "RunConfig", "train"]
