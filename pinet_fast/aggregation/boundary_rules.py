"""Boundary rules: which torch functions are rewritten to which stratified op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pinet_fast.aggregation.broadcast_rules import broadcast_rules
from pinet_fast.aggregation.convolution_rules import convolution_rules
from pinet_fast.aggregation.linear_rules import linear_rules
from pinet_fast.aggregation.lookup_rules import lookup_rules
from pinet_fast.aggregation.norm_rules import norm_rules
from pinet_fast.aggregation.product_rules import product_rules
from pinet_fast.aggregation.recurrent_rules import recurrent_rules

if TYPE_CHECKING:
    from pinet_fast.aggregation.interception import BoundaryRule


def default_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules by torch function."""
    return {
        **linear_rules(),
        **norm_rules(),
        **broadcast_rules(),
        **convolution_rules(),
        **lookup_rules(),
        **product_rules(),
        **recurrent_rules(),
    }
