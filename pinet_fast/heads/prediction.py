"""A prediction layer of its own for each stratum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast.errors import ConfigError, StrataError
from pinet_fast.heads.base import Heads

if TYPE_CHECKING:
    from pinet_fast.aggregation.strata_index import RowGroups


class PredictionHeads(Heads):
    """``x + W_s x + b_s`` for rows of stratum s.

    Scores are linear in the state: ``E x`` over items in sequence models, ``w . x`` in DIN. So
    this is a prediction layer for each stratum: ``E (I + W_s)`` of the same rank, and, for DIN,
    any ``w_s``. W and b start at zero.

    Args:
        num_strata: S.
        dim: d.

    Source:
        The per-stratum prediction networks of arXiv 2208.09130; the form is our reading.
    """

    def __init__(self, num_strata: int, dim: int) -> None:
        super().__init__()
        if num_strata < 1 or dim < 1:
            raise ConfigError(f"PredictionHeads: expected S, d >= 1; got S={num_strata}, d={dim}")
        self.num_strata = num_strata
        self.weight = nn.Parameter(torch.zeros(num_strata, dim, dim))
        self.bias = nn.Parameter(torch.zeros(num_strata, dim))

    def forward(self, rows: Tensor, groups: RowGroups) -> Tensor:
        """Route every row to the layer of its stratum, [N, d].

        Raises:
            StrataError: ``groups`` are of another number of rows or strata.
        """
        if groups.num_rows != rows.shape[0] or groups.num_strata != self.num_strata:
            raise StrataError(
                f"PredictionHeads: expected groups of {rows.shape[0]} rows in {self.num_strata} "
                f"strata; got {groups.num_rows} rows in {groups.num_strata}"
            )
        parts = zip(groups.split(rows), self.weight, self.bias, strict=True)
        out = torch.cat([part + F.linear(part, weight, bias) for part, weight, bias in parts])
        if groups.order is None:
            return out
        return torch.empty_like(out).index_copy(0, groups.order, out)
