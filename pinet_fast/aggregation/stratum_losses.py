"""The mean losses of the strata: their values, and their backward from the losses of rows on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pinet_fast.aggregation import compiled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.aggregation.losses import LossRows
    from pinet_fast.aggregation.strata_index import RowGroups


class StratumLosses:
    """Mean losses by stratum: ``sum_i w_i l_i / sum_i w_i`` over the rows of each.

    Args:
        losses: Losses of the rows, with their graph, [N], float32 at least.
        groups: Which rows belong to which stratum.
        rows: What the rows are.
        factors: ``w_i / sum_i w_i`` of every row, [N]; None where all weigh alike.
    """

    def __init__(
        self, losses: Tensor, groups: RowGroups, rows: LossRows, factors: Tensor | None = None
    ) -> None:
        self.losses = losses
        self.groups = groups
        self.rows = rows
        self._factors = factors
        self._by_row: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """Return the means with their graph, [S]; 0 for absent strata."""
        return self._means(self.losses)

    def reduce(self, cotangents: Sequence[float] | None = None) -> Tensor:
        """Return the means without graph, [S], 0 for absent strata; and make ready for a backward.

        Before the backward the losses are in the caches, after it they are not.

        Args:
            cotangents: Of the means, S numbers; None for ones.
        """
        functions = compiled.functions()
        if functions is not None and self._factors is None:
            found = functions.mean_losses(
                self.losses, self.groups.ids, self.groups.counts, cotangents
            )
            if found is not None:
                means: Tensor
                means, self._by_row = found
                return means
        self._by_row = self._gradient(cotangents)
        losses, ids = self.losses.detach(), self.groups.ids
        if losses.device.type != "cpu":
            return self._means(losses)
        weighted = losses if self._factors is None else losses * self._factors
        sums = torch.bincount(ids, weighted.double(), self.groups.num_strata)
        return (sums * self._inverse_counts() if self._factors is None else sums).to(losses.dtype)

    def backward(self, *, retain_graph: bool = False) -> None:
        """Run the backward of the means, times their cotangents.

        Args:
            retain_graph: Whether another backward follows.
        """
        if self._by_row is None:
            self.reduce()
        torch.autograd.backward(self.losses, self._by_row, retain_graph=retain_graph)

    def _means(self, losses: Tensor) -> Tensor:
        zeros = losses.new_zeros(self.groups.num_strata)
        if self._factors is not None:
            return zeros.index_add(0, self.groups.ids, losses * self._factors)
        # The factor of a stratum comes last: two passes over the rows less.
        return zeros.index_add(0, self.groups.ids, losses) * self._inverse_counts()

    def _gradient(self, cotangents: Sequence[float] | None) -> Tensor:
        """Return the gradient of the losses, [N]."""
        ids = self.groups.ids
        given = None if cotangents is None else self.losses.new_tensor(cotangents)
        if self._factors is not None:
            return self._factors if given is None else given.index_select(0, ids) * self._factors
        factors = self._inverse_counts()
        return (factors if given is None else given * factors).index_select(0, ids)

    def _inverse_counts(self) -> Tensor:
        return self.losses.new_tensor([1.0 / max(count, 1) for count in self.groups.counts])
