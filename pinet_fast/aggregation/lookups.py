"""Boundary ops of item tables: lookups and bags of lookups.

Their virtual leaf [S, V, d] receives a sparse COO gradient over (stratum, item), never [S, V, d].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.first_order import first_order

if TYPE_CHECKING:
    from pinet_fast.aggregation.layout import RowLayout

# torch.autograd.Function is untyped: its contexts and apply are Any throughout this file.

BagMode = Literal["sum", "mean", "max"]


def _over_strata(strata: Tensor, ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Return the sparse gradient of a leaf [S, V, d]."""
    indices = torch.stack([strata, ids])
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)


class StratifiedEmbedding(torch.autograd.Function):
    """``y = E[ids]``, as ``F.embedding`` (``padding_idx`` carries no gradient) or by indexing.

    Indexing takes negative ids too, as Python does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        table: Tensor,
        leaf: Tensor,
        padding_idx: int | None,
        is_sparse: bool,
        row_strata: Tensor,
        layout: RowLayout,
        indexing: bool,
    ) -> Tensor:
        ctx.save_for_backward(ids, row_strata)
        ctx.shape = leaf.shape
        ctx.padding_idx = padding_idx
        ctx.is_sparse = is_sparse
        ctx.indexing = indexing
        ctx.layout = layout  # read by provenance.trace
        return table[ids] if indexing else F.embedding(ids, table)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, strata = ctx.saved_tensors
        flat_ids = ids.reshape(-1).long()
        if ctx.indexing:
            flat_ids = flat_ids.remainder(ctx.shape[1])
        values = grad.reshape(flat_ids.numel(), *ctx.shape[2:])
        if ctx.padding_idx is not None:
            is_padding = flat_ids == ctx.padding_idx
            if bool(is_padding.any()):  # ragged batches have none, and are spared the copy
                if ctx.is_sparse:  # SparseAdam moves every row it is given
                    kept = ~is_padding
                    strata, flat_ids, values = strata[kept], flat_ids[kept], values[kept]
                else:
                    values = values.masked_fill(is_padding.unsqueeze(1), 0.0)
        leaf = _over_strata(strata, flat_ids, values, ctx.shape)
        return None, None, leaf, None, None, None, None, None


class StratifiedEmbeddingBag(torch.autograd.Function):
    """Sums, means or maxima of bags of lookups; one bag a row of the batch.

    The forward is torch's own. ``bags`` is the bag of every id, int64 [N].
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        offsets: Tensor,
        bags: Tensor,
        table: Tensor,
        leaf: Tensor,
        mode: BagMode,
        item_weights: Tensor | None,
        include_last_offset: bool,
        padding_idx: int | None,
        is_sparse: bool,
        bag_strata: Tensor,
        layout: RowLayout,
    ) -> Tensor:
        code = ("sum", "mean", "max").index(mode)
        out, _, _, best = torch.embedding_bag(
            table, ids, offsets, False, code, False, item_weights, include_last_offset, padding_idx
        )
        ctx.mode = mode
        ctx.shape = leaf.shape
        ctx.padding_idx = padding_idx
        ctx.is_sparse = is_sparse
        ctx.layout = layout  # read by provenance.trace
        kept = best if mode == "max" else ids
        with_weights = item_weights is not None and item_weights.requires_grad
        table_rows = table if with_weights else None
        ctx.save_for_backward(ids, bags, kept, bag_strata, item_weights, table_rows)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, bags, best, bag_strata, item_weights, table = ctx.saved_tensors
        is_item = torch.ones_like(ids, dtype=torch.bool)
        if ctx.padding_idx is not None:
            is_item = ids != ctx.padding_idx
        if ctx.mode == "max":
            leaf = _of_maxima(grad, best, bags[is_item], bag_strata, ctx.shape)
            return None, None, None, None, leaf, *[None] * 7
        values = grad.index_select(0, bags)
        for_weights = None
        if item_weights is not None:
            if ctx.needs_input_grad[6]:
                for_weights = (values * table.index_select(0, ids)).sum(1)
                for_weights = for_weights.masked_fill(~is_item, 0.0)
            values = values * item_weights.unsqueeze(1)
        if ctx.mode == "mean":
            sizes = torch.bincount(bags[is_item], minlength=grad.shape[0]).clamp_min(1)
            values = values / sizes.index_select(0, bags).unsqueeze(1).to(values.dtype)
        strata = bag_strata.index_select(0, bags)
        if ctx.padding_idx is not None:
            strata, ids, values = strata[is_item], ids[is_item], values[is_item]
        leaf = _over_strata(strata, ids.long(), values, ctx.shape)
        return None, None, None, None, leaf, None, for_weights, *[None] * 5


def _of_maxima(
    grad: Tensor, best: Tensor, item_bags: Tensor, bag_strata: Tensor, shape: torch.Size
) -> Tensor:
    """Return the leaf's gradient where each feature of a bag came from one item, ``best`` [B, d].

    Empty bags have no item; their gradient goes nowhere.
    """
    _, num_items, dim = shape
    filled = torch.bincount(item_bags, minlength=grad.shape[0]) > 0
    grad, best, strata = grad[filled], best[filled].long(), bag_strata[filled]
    keys, place = torch.unique(strata.unsqueeze(1) * num_items + best, return_inverse=True)
    values = grad.new_zeros((keys.numel(), dim)).scatter_add_(0, place, grad)
    return _over_strata(keys // num_items, keys % num_items, values, shape)
