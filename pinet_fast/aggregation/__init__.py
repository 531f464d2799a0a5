"""Stratum gradients and their aggregation: the optimizer wrapper and everything under it."""

from __future__ import annotations

from pinet_fast.aggregation.optimizer import GradientAggregator
from pinet_fast.aggregation.report import AggregationReport
from pinet_fast.aggregation.sharing import shared
from pinet_fast.aggregation.strata_index import RowGroups, StrataIndex

__all__ = ["AggregationReport", "GradientAggregator", "RowGroups", "StrataIndex", "shared"]
