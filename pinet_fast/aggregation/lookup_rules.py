"""Boundary rules of item tables: embedding, embedding_bag, and a parameter indexed by ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.boundary import apply
from pinet_fast.aggregation.lookups import StratifiedEmbedding, StratifiedEmbeddingBag
from pinet_fast.aggregation.roots import func_name
from pinet_fast.aggregation.rule_arguments import bind
from pinet_fast.aggregation.slice_rule import slice_rule
from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from pinet_fast.aggregation.interception import BoundaryRule, Interception

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _embedding_arguments(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Any, ...]:
    return input, weight, padding_idx, max_norm, scale_grad_by_freq, sparse


def _embedding(mode: Interception, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ids, table, padding_idx, max_norm, scale, is_sparse = bind(_embedding_arguments, args, kwargs)
    _refuse_counting("embedding", max_norm, scale)
    return _lookup(mode, func, args, kwargs, ids, table, padding_idx, is_sparse)


def _torch_embedding_arguments(
    weight: Any,
    indices: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Any, ...]:
    # Ids below 0 name no row here, nor do those past the last.
    padding = padding_idx if 0 <= padding_idx < weight.shape[0] else None
    return indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse


def functional_embedding(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``torch.embedding`` as ``F.embedding`` takes them."""
    return bind(_torch_embedding_arguments, args, kwargs), {}


def _lookup(
    mode: Interception,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ids: Tensor,
    table: Tensor,
    padding_idx: int | None = None,
    is_sparse: bool = False,
    indexing: bool = False,
) -> Any:
    root = mode.root_of(table)
    if root is None:
        raise BoundaryError(
            f"{func_name(func)}: expected a parameter as the table and ids of the batch, got "
            f"{mode.describe([ids, table])}; detach what the ids are computed from, as in "
            "F.embedding(ids.detach(), table)"
        )
    layout = mode.find(tuple(ids.shape), ids, (root,), "embedding")
    if layout is None:
        return mode.derive(func, args, kwargs)
    items = table.shape[0]
    if padding_idx is not None and not -items <= padding_idx < items:
        return func(*args, **kwargs)  # refused by torch, in its own words
    padding = None if padding_idx is None else padding_idx % items
    leaf = mode.lookup_leaf(root, "embedding", layout, is_sparse)
    strata = mode.rows.groups_of(layout, tuple(ids.shape)).ids
    rows = root.detached()
    return apply(StratifiedEmbedding, ids, rows, leaf, padding, is_sparse, strata, layout, indexing)


def _getitem(mode: Interception, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``P[ids]``; other keys are views or gathers of their own."""
    table, key = args
    if (
        isinstance(key, Tensor)
        and key.dtype in _INTEGERS[:4]
        and key.dim()
        and mode.root_of(table) is not None
    ):
        return _lookup(mode, func, args, kwargs, key, table, indexing=True)
    return slice_rule(mode, func, args, kwargs)


def _index_select_arguments(input: Any, dim: int, index: Any) -> tuple[Any, ...]:
    return input, dim, index


def _index_select(
    mode: Interception, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    table, dim, ids = bind(_index_select_arguments, args, kwargs)
    if dim == 0 and mode.root_of(table) is not None:
        return _lookup(mode, func, args, kwargs, ids, table, indexing=True)
    return slice_rule(mode, func, args, kwargs)


def _bag_arguments(
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: Any = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Any, ...]:
    return (
        input, weight, offsets, max_norm, scale_grad_by_freq, mode, sparse, per_sample_weights,
        include_last_offset, padding_idx,
    )  # fmt: skip


def _embedding_bag(
    mode: Interception, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    ids, table, offsets, max_norm, scale, kind, is_sparse, weights, with_last, padding_idx = bind(
        _bag_arguments, args, kwargs
    )
    _refuse_counting("embedding_bag", max_norm, scale)
    if not ids.is_floating_point() and table.dtype.is_floating_point:
        root = mode.root_of(table)
    else:
        ids, table = table, ids  # the order of the arguments before torch 1.0 is still taken
        root = mode.root_of(table)
    if root is None or (weights is not None and mode.root_of(weights) is not None):
        raise BoundaryError(
            "embedding_bag: expected a parameter as the table, and weights of the items that are "
            "no parameter themselves; look items up with F.embedding and multiply"
        )
    if ids.dim() == 2:
        num_bags, width = ids.shape
        offsets = torch.arange(0, ids.numel(), max(width, 1), device=ids.device)[:num_bags]
        ids, with_last = ids.reshape(-1), False
        weights = None if weights is None else weights.reshape(-1)
    bounds = offsets[:-1] if with_last else offsets
    layout = mode.find((bounds.numel(),), None, (root,), "embedding_bag")
    if layout is None:
        return mode.derive(func, args, kwargs)
    bags = torch.bucketize(torch.arange(ids.numel(), device=ids.device), bounds, right=True) - 1
    if weights is not None:
        weights = weights.to(table.dtype)
    padding = None if padding_idx is None else padding_idx % table.shape[0]
    leaf = mode.lookup_leaf(root, "embedding_bag", layout, is_sparse)
    strata = mode.rows.groups_of(layout, (bounds.numel(),)).ids
    return apply(
        StratifiedEmbeddingBag, ids, offsets, bags, root.detached(), leaf, kind, weights,
        bool(with_last), padding, is_sparse, strata, layout,
    )  # fmt: skip


def _refuse_counting(op: str, max_norm: float | None, scale: bool) -> None:
    if max_norm is not None or scale:
        raise BoundaryError(
            f"{op}: max_norm and scale_grad_by_freq change the table or its gradient by counting "
            "over the whole batch, so strata cannot be told apart; leave them off"
        )


def lookup_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules of tables by torch function."""
    return {
        F.embedding: _embedding,
        F.embedding_bag: _embedding_bag,
        torch.index_select: _index_select,
        Tensor.index_select: _index_select,
        Tensor.__getitem__: _getitem,
    }
