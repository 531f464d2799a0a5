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
        factors: ``w_i / sum_i w_i`` of every row, [N]; None where all weigh alike. Where they have
            a graph, so have the means through them.
    """

    def __init__(
        self, losses: Tensor, groups: RowGroups, rows: LossRows, factors: Tensor | None = None
    ) -> None:
        self.losses = losses
        self.groups = groups
        self.rows = rows
        self._factors = factors
        self._cotangents: Sequence[float] | None = None
        self._by_row: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """Return the means with their graph, [S]; 0 for absent strata."""
        return self._means(self.losses, self._factors)

    def reduce(self, cotangents: Sequence[float] | None = None) -> Tensor:
        """Return the means without graph, [S], 0 for absent strata; and make ready for a backward.

        Before the backward the losses are in the caches, after it they are not.

        Args:
            cotangents: Of the means, S numbers; None for ones.
        """
        self._cotangents = cotangents
        functions = compiled.functions()
        if functions is not None and self._factors is None:
            found = functions.mean_losses(
                self.losses, self.groups.ids, self.groups.counts, cotangents
            )
            if found is not None:
                means: Tensor
                means, self._by_row = found
                return means
        losses, ids = self.losses.detach(), self.groups.ids
        factors = None if self._factors is None else self._factors.detach()
        self._by_row = self._gradient(factors)
        if losses.device.type != "cpu":
            return self._means(losses, factors)
        weighted = losses if factors is None else losses * factors
        sums = torch.bincount(ids, weighted.double(), self.groups.num_strata)
        return (sums * self._inverse_counts() if factors is None else sums).to(losses.dtype)

    def backward(self, *, retain_graph: bool = False) -> None:
        """Run the backward of the means, times their cotangents.

        Args:
            retain_graph: Whether another backward follows.
        """
        if self._by_row is None:
            self.reduce()
        if self._factors is not None and self._factors.requires_grad:
            given = self._given()
            values = self.values
            cotangents = torch.ones_like(values) if given is None else given
            torch.autograd.backward(values, cotangents, retain_graph=retain_graph)
        else:
            torch.autograd.backward(self.losses, self._by_row, retain_graph=retain_graph)

    def _means(self, losses: Tensor, factors: Tensor | None) -> Tensor:
        zeros = losses.new_zeros(self.groups.num_strata)
        if factors is not None:
            return zeros.index_add(0, self.groups.ids, losses * factors)
        # The factor of a stratum comes last: two passes over the rows less.
        return zeros.index_add(0, self.groups.ids, losses) * self._inverse_counts()

    def _given(self) -> Tensor | None:
        return None if self._cotangents is None else self.losses.new_tensor(self._cotangents)

    def _gradient(self, factors: Tensor | None) -> Tensor:
        """Return the gradient of the losses, [N]."""
        ids, given = self.groups.ids, self._given()
        if factors is not None:
            return factors if given is None else given.index_select(0, ids) * factors
        inverse = self._inverse_counts()
        return (inverse if given is None else given * inverse).index_select(0, ids)

    def _inverse_counts(self) -> Tensor:
        return self.losses.new_tensor([1.0 / max(count, 1) for count in self.groups.counts])
