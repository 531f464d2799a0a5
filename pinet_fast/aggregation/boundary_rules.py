"""Boundary rules: which torch functions are rewritten to which stratified op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.boundary import (
    StratifiedBroadcast,
    StratifiedEmbedding,
    StratifiedLayerNorm,
    StratifiedLinear,
    StratifiedMatmul,
)
from pinet_fast.aggregation.interception import BoundaryRule, Interception, func_name
from pinet_fast.errors import BoundaryError

Func = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _linear(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    rows, weight, bias = _bind(args, kwargs, ("input", "weight", "bias"), {"bias": None})
    weight_root, bias_root = mode.root_of(weight), mode.root_of(bias)
    if mode.root_of(rows) is not None:
        raise BoundaryError("linear: the input is a parameter and the weight holds rows")
    shape = tuple(rows.shape[:-1])
    layout = mode.rows.find(shape, rows)
    if layout is None:
        return mode.derive(func, args, kwargs)
    return StratifiedLinear.apply(  # type: ignore[no-untyped-call]
        rows,
        _detached(weight, weight_root),
        _detached(bias, bias_root),
        mode.dense_leaf(weight_root, "linear", layout),
        mode.dense_leaf(bias_root, "linear", layout),
        mode.rows.groups_of(layout, shape),
        layout,
    )


def _matmul(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    rows, weight = _bind(args, kwargs, ("input", "other"), {}, aliases={"mat2": "other"})
    root = mode.root_of(weight)
    if root is None or weight.dim() != 2 or rows.dim() < 2:
        raise BoundaryError(
            f"{func_name(func)}: expected rows [*, D_in] times a parameter [D_in, D_out]; got "
            f"{list(rows.shape)} times {list(weight.shape)}; put the rows on the left, as in "
            "`rows @ weight.T`"
        )
    shape = tuple(rows.shape[:-1])
    layout = mode.rows.find(shape, rows)
    if layout is None:
        return mode.derive(func, args, kwargs)
    leaf = mode.dense_leaf(root, "matmul", layout)
    groups = mode.rows.groups_of(layout, shape)
    return StratifiedMatmul.apply(rows, weight.detach(), leaf, groups, layout)  # type: ignore[no-untyped-call]


def _embedding(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    defaults = {"padding_idx": None, "max_norm": None, "norm_type": 2.0}
    defaults |= {"scale_grad_by_freq": False, "sparse": False}
    ids, table, padding_idx, max_norm, _, scale, _ = _bind(
        args, kwargs, (*names, "sparse"), defaults
    )
    root = mode.root_of(table)
    if root is None:
        raise BoundaryError("embedding: the ids are computed from a parameter")
    if max_norm is not None or scale:
        raise BoundaryError(
            "embedding: max_norm and scale_grad_by_freq change the table or its gradient by "
            "counting over the whole batch, so strata cannot be told apart; leave them off"
        )
    layout = mode.rows.find(tuple(ids.shape), ids)
    if layout is None:
        return mode.derive(func, args, kwargs)
    padding = -1 if padding_idx is None else padding_idx % table.shape[0]
    leaf = mode.lookup_leaf(root, "embedding", layout)
    groups = mode.rows.groups_of(layout, tuple(ids.shape))
    return StratifiedEmbedding.apply(ids, table.detach(), leaf, padding, groups.ids, layout)  # type: ignore[no-untyped-call]


def _layer_norm(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    names = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
    defaults = {"weight": None, "bias": None, "eps": 1e-5, "cudnn_enable": True}
    rows, normalized_shape, weight, bias, eps, _ = _bind(args, kwargs, names, defaults)
    if mode.root_of(rows) is not None:
        raise BoundaryError("layer_norm: the input is a parameter and the scale holds rows")
    normalized = [int(size) for size in normalized_shape]
    shape = tuple(rows.shape[: rows.dim() - len(normalized)])
    layout = mode.rows.find(shape, rows)
    if layout is None:
        return mode.derive(func, args, kwargs)
    weight_root, bias_root = mode.root_of(weight), mode.root_of(bias)
    return StratifiedLayerNorm.apply(  # type: ignore[no-untyped-call]
        rows,
        normalized,
        _detached(weight, weight_root),
        _detached(bias, bias_root),
        mode.dense_leaf(weight_root, "layer_norm", layout),
        mode.dense_leaf(bias_root, "layer_norm", layout),
        eps,
        mode.rows.groups_of(layout, shape),
        layout,
    )


def _broadcast(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """``rows + p``, ``rows - p``, ``rows * p`` and the same with the sides exchanged."""
    left, right = _bind(args, kwargs, ("input", "other"), {})
    op = func_name(func).strip("_").removeprefix("r")
    if func_name(func) == "__rsub__":
        left, right = right, left
    if op in ("sub", "subtract"):
        # x - p = x + (-p), exactly: the negation is batch-free or row-wise, whichever side it is.
        right = mode.derive(torch.neg, (right,), {}) if mode.root_of(right) else -right
    rows, parameter = (right, left) if mode.root_of(left) is not None else (left, right)
    root = mode.root_of(parameter)
    if root is None or mode.root_of(rows) is not None:
        raise BoundaryError(f"{op}: expected rows of the batch and one parameter")
    out_shape = torch.broadcast_shapes(rows.shape, parameter.shape)  # type: ignore[no-untyped-call]
    extra = len(out_shape) - parameter.dim()
    # Dimensions in which the parameter has values of its own cannot be the rows'.
    sizes = tuple(
        size if dim < extra or parameter.shape[dim - extra] == 1 else -1
        for dim, size in enumerate(out_shape)
    )
    layout = mode.rows.find(sizes, rows if rows.shape == out_shape else None)
    if layout is None:
        return mode.derive(func, args, kwargs)
    leaf = mode.dense_leaf(root, op, layout)
    groups = mode.rows.groups_along(layout)
    multiply = op in ("mul", "multiply")
    return StratifiedBroadcast.apply(rows, parameter.detach(), leaf, multiply, groups, layout)  # type: ignore[no-untyped-call]


def _detached(value: Tensor | None, root: object | None) -> Tensor | None:
    """Keep a parameter out of the graph; leave other tensors in it, with their own gradient."""
    return value.detach() if value is not None and root is not None else value


def _bind(
    args: Args,
    kwargs: Kwargs,
    names: tuple[str, ...],
    defaults: Kwargs,
    aliases: dict[str, str] | None = None,
) -> list[Any]:
    """Bind call arguments to ``names``; functions of torch have no signature to inspect."""
    bound = dict(zip(names, args, strict=False))
    for key, value in kwargs.items():
        name = (aliases or {}).get(key, key)
        if name not in names or name in bound:
            raise BoundaryError(f"argument {key}={value!r} is not supported at a boundary")
        bound[name] = value
    return [bound[name] if name in bound else defaults[name] for name in names]


def default_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules by torch function."""
    rules: dict[Any, BoundaryRule] = {
        F.linear: _linear,
        F.embedding: _embedding,
        F.layer_norm: _layer_norm,
    }
    for name in ("matmul", "mm"):
        rules[getattr(torch, name)] = rules[getattr(Tensor, name)] = _matmul
    rules[Tensor.__matmul__] = _matmul
    for name in ("add", "sub", "subtract", "mul", "multiply"):
        rules[getattr(torch, name)] = rules[getattr(Tensor, name)] = _broadcast
    for name in ("__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__rsub__"):
        rules[getattr(Tensor, name)] = _broadcast
    return rules
