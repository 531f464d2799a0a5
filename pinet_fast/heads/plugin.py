"""Plugin heads: one small residual bottleneck per stratum on top of a frozen backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast.errors import ConfigError, StrataError
from pinet_fast.heads.base import Heads
from pinet_fast.kernels import routed_linear

if TYPE_CHECKING:
    from pinet_fast.aggregation.strata_index import RowGroups


class PluginHeads(Heads):
    """``x + up_s(gelu(down_s(x)))`` for rows of stratum s; d to d/2 to d.

    ``up`` starts at zero, so that untrained heads are the identity exactly and the backbone's
    scores are where training starts from. Each head sees, and is trained by, rows of its stratum
    only.

    Args:
        num_strata: S.
        dim: d.
        width: Bottleneck width; d / 2 where not given.

    Source:
        The plugin networks of arXiv 2208.09130. Form and place are our reading: the bottleneck is
        that of the authors' later public code, without an activation after the sum.
    """

    def __init__(self, num_strata: int, dim: int, width: int | None = None) -> None:
        super().__init__()
        width = width or max(1, dim // 2)
        if num_strata < 1 or dim < 1:
            raise ConfigError(f"PluginHeads: expected S, d >= 1; got S={num_strata}, d={dim}")
        self.num_strata = num_strata
        self.down_weight = nn.Parameter(torch.empty(num_strata, width, dim))
        self.down_bias = nn.Parameter(torch.zeros(num_strata, width))
        self.up_weight = nn.Parameter(torch.zeros(num_strata, dim, width))
        self.up_bias = nn.Parameter(torch.zeros(num_strata, dim))
        nn.init.normal_(self.down_weight, std=dim**-0.5)

    def forward(self, rows: Tensor, groups: RowGroups) -> Tensor:
        """Route every row to the head of its stratum: as of :class:`Heads`."""
        if groups.num_rows != rows.shape[0] or groups.num_strata != self.num_strata:
            raise StrataError(
                f"PluginHeads: expected groups of {rows.shape[0]} rows in {self.num_strata} "
                f"strata; got {groups.num_rows} rows in {groups.num_strata}"
            )
        routes = (groups.ids, groups.offsets, groups.order)
        inner = F.gelu(routed_linear(rows, self.down_weight, self.down_bias, *routes))
        out: Tensor = rows + routed_linear(inner, self.up_weight, self.up_bias, *routes)
        return out
