"""The S stratum gradients of one parameter, in full or as the item rows that were touched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pinet_fast.aggregation import compiled
from pinet_fast.kernels import (
    _registry,
    stratified_embedding_add,
    stratified_embedding_reduce,
)


@dataclass(slots=True)
class StratumGradient:
    """The S stratum gradients of one parameter.

    Attributes:
        values: [S, *shape]; or [S, U, d] where only U rows of the parameter were touched.
        rows: The touched rows of the parameter, int64 [U], ascending; None = all.
        touched: Which strata touched which of these rows, bool [S, U]; None where ``rows`` is.
        is_sparse: The parameter's own gradient is sparse (``sparse=True`` lookups alone), so what
            the optimizer gets is a sparse tensor too, as SparseAdam wants it.
    """

    values: Tensor
    rows: Tensor | None = None
    touched: Tensor | None = None
    is_sparse: bool = False

    def spread(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Return a gradient of the touched rows, [U, d], as one of the parameter ``like``."""
        if self.rows is None:
            return gradient
        if self.is_sparse:
            return torch.sparse_coo_tensor(
                self.rows.unsqueeze(0), gradient, like.shape, is_coalesced=True,
                check_invariants=False,
            )  # fmt: skip
        return torch.zeros_like(like).index_copy_(0, self.rows, gradient)

    def dense(self, like: Tensor) -> Tensor:
        """Return all S gradients in full, [S, *shape]; for tests and exact comparisons."""
        if self.rows is None:
            return self.values
        full = like.new_zeros((self.values.shape[0], *like.shape))
        return full.index_copy_(1, self.rows, self.values)

    def plus(self, other: StratumGradient, like: Tensor) -> StratumGradient:
        """Return the sum with the stratum gradients of another backward."""
        if self.rows is None or other.rows is None:
            return StratumGradient(self.dense(like) + other.dense(like))
        num_rows = like.shape[0]
        rows, place = distinct_rows(torch.cat([self.rows, other.rows]), num_rows)
        mine, theirs = place[: self.rows.numel()], place[self.rows.numel() :]
        assert self.touched is not None
        assert other.touched is not None
        num_strata, _, *features = self.values.shape
        values = self.values.new_zeros((num_strata, rows.numel(), *features))
        values.index_add_(1, mine, self.values).index_add_(1, theirs, other.values)
        touched = torch.zeros((num_strata, rows.numel()), dtype=torch.bool, device=rows.device)
        touched[:, mine] = self.touched
        touched[:, theirs] |= other.touched
        return StratumGradient(values, rows, touched, self.is_sparse and other.is_sparse)


def from_lookups(
    lookups: list[Tensor], dense: Tensor | None, *, is_sparse: bool
) -> StratumGradient:
    """Merge the gradients of the lookups in one parameter, and its dense gradient where it has one.

    Args:
        lookups: Sparse COO [S, V, d] over (stratum, item), at least one; need not be coalesced.
        dense: [S, V, d] or None.
        is_sparse: The parameter's own gradient is sparse where ``dense`` is None.
    """
    if dense is None:
        found = _reduced(lookups)
        if found is not None:
            return StratumGradient(*found, is_sparse)
    ids = [g._indices()[1] for g in lookups]
    strata = [g._indices()[0] for g in lookups]
    values = [g._values() for g in lookups]
    if dense is not None:
        # A gradient may be expanded, or shared with another holder.
        dense = dense.clone(memory_format=torch.contiguous_format)
        stratified_embedding_add(dense, ids, strata, values)
        return StratumGradient(dense)
    num_strata, num_rows = lookups[0].shape[:2]
    rows, sums, touched = stratified_embedding_reduce(ids, strata, values, num_strata, num_rows)
    return StratumGradient(sums, rows, touched, is_sparse)


def _reduced(lookups: list[Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return values, rows and touched in one compiled call, or None where that is not for it."""
    functions = compiled.functions()
    if functions is None or not _registry.is_first("cpp", ("stratified_embedding_reduce",)):
        return None
    found = functions.reduce(lookups)
    if found is None:
        return None
    _registry.record_call("stratified_embedding_reduce", "cpp")
    rows, values, touched = found
    return values, rows, touched


def distinct_rows(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the distinct ids, ascending, and the position of every id among them.

    By marking rows instead of sorting ids: a pass over the table's length in bytes is cheaper.

    Args:
        ids: int64 [N] in ``0..num_rows-1``.
        num_rows: Rows of the table.
    """
    mark = torch.zeros(num_rows, dtype=torch.bool, device=ids.device)
    mark[ids] = True
    rows = mark.nonzero().squeeze(1)
    place = torch.empty(num_rows, dtype=torch.int64, device=ids.device)
    place[rows] = torch.arange(rows.numel(), device=ids.device)
    return rows, place[ids]
