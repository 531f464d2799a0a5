"""Gated heads: each row decides how much of its stratum's plugin it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pinet_fast.heads.plugin import PluginHeads

if TYPE_CHECKING:
    from pinet_fast.aggregation.strata_index import RowGroups


class GatedHeads(PluginHeads):
    """``x + sigmoid(v_s . x + c_s) (plugin_s(x) - x)`` for rows of stratum s.

    The gate starts half open, on a plugin that is the identity, so untrained heads are the
    identity.

    Args:
        num_strata: S.
        dim: d.
        width: Bottleneck width of the plugin; d / 2 where not given.

    Source:
        Our reading: the issue of the paper (arXiv 2208.09130) is how far a user departs from what
        all share; the gate makes that a matter of the user and not of the stratum alone.
    """

    def __init__(self, num_strata: int, dim: int, width: int | None = None) -> None:
        super().__init__(num_strata, dim, width)
        self.gate_weight = nn.Parameter(torch.zeros(num_strata, dim))
        self.gate_bias = nn.Parameter(torch.zeros(num_strata))

    def forward(self, rows: Tensor, groups: RowGroups) -> Tensor:
        """Route every row to the head of its stratum, [N, d], as ``PluginHeads`` does."""
        change = super().forward(rows, groups) - rows
        gate = (rows * self.gate_weight[groups.ids]).sum(-1) + self.gate_bias[groups.ids]
        return rows + torch.sigmoid(gate).unsqueeze(-1) * change
