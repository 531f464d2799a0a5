"""Boundary rules of norms: ``layer_norm``, ``group_norm`` and ``rms_norm``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pinet_fast.aggregation.boundary import StratifiedGroupNorm, StratifiedLayerNorm, apply
from pinet_fast.aggregation.broadcast import StratifiedBroadcast
from pinet_fast.aggregation.rule_arguments import Args, Func, Kwargs, bind, detached
from pinet_fast.aggregation.slice_rule import slice_rule
from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from pinet_fast.aggregation.interception import BoundaryRule, Interception


def _layer_norm_arguments(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Args:
    return input, normalized_shape, weight, bias, eps


def _layer_norm(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    rows, normalized_shape, weight, bias, eps = bind(_layer_norm_arguments, args, kwargs)
    roots = mode.by_id
    if id(rows) in roots or (rows._base is not None and mode.root_of(rows) is not None):
        raise BoundaryError(
            "layer_norm: expected rows of the batch as the input, got "
            f"{mode.describe([rows])}, and rows as the scale or bias; mark work that belongs to "
            'no user by `with opt.shared():`, or use GradientAggregator(..., mode="exact")'
        )
    normalized = [int(size) for size in normalized_shape]
    shape = tuple(rows.shape[: rows.dim() - len(normalized)])
    weight_root = None if weight is None else roots.get(id(weight)) or mode.root_of(weight)
    bias_root = None if bias is None else roots.get(id(bias)) or mode.root_of(bias)
    layout = mode.find(shape, rows, (weight_root, bias_root), "layer_norm")
    if layout is None:
        return mode.derive(func, args, kwargs)
    if rows.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        rows = rows.float()  # autocast runs norms in float32 there; on a CPU as they come
    return apply(
        StratifiedLayerNorm,
        rows,
        normalized,
        weight if weight_root is None else weight_root.detached(),
        bias if bias_root is None else bias_root.detached(),
        mode.dense_leaf(weight_root, "layer_norm", layout),
        mode.dense_leaf(bias_root, "layer_norm", layout),
        eps,
        mode.rows.groups_of(layout, shape),
        layout,
    )


def _group_norm_arguments(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Args:
    return input, num_groups, weight, bias, eps


def _group_norm(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """Rows are dimension 0 by definition; channels, which hold the groups, are dimension 1."""
    rows, num_groups, weight, bias, eps = bind(_group_norm_arguments, args, kwargs)
    weight_root, bias_root = mode.root_of(weight), mode.root_of(bias)
    layout = None
    # One value a channel is refused by torch, in its own words.
    if mode.root_of(rows) is None and rows.dim() >= 2 and rows.numel() != num_groups:
        sizes = (rows.shape[0], *[-1] * (rows.dim() - 1))
        layout = mode.find(sizes, rows, (weight_root, bias_root), "group_norm")
    if layout is None:
        return slice_rule(mode, func, args, kwargs)
    weight, bias = detached(weight, weight_root), detached(bias, bias_root)
    if rows.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        # Autocast runs norms in float32 there; on a CPU as they come.
        rows, weight, bias = (None if t is None else t.float() for t in (rows, weight, bias))
    return apply(
        StratifiedGroupNorm,
        rows,
        num_groups,
        weight,
        bias,
        mode.dense_leaf(weight_root, "group_norm", layout),
        mode.dense_leaf(bias_root, "group_norm", layout),
        eps,
        mode.rows.groups_along(layout),
        layout,
    )


def _rms_norm_arguments(
    input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Args:
    return input, normalized_shape, weight, eps


def _rms_norm(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """The norm has no parameter, and its scale is a broadcast product, as in torch's own code."""
    rows, normalized_shape, weight, eps = bind(_rms_norm_arguments, args, kwargs)
    root = mode.root_of(weight)
    if root is None or mode.root_of(rows) is not None:
        raise BoundaryError(
            "rms_norm: expected rows of the batch and a parameter as the scale, got "
            f"{mode.describe([rows, weight])}; mark work that belongs to no user by "
            '`with opt.shared():`, or use GradientAggregator(..., mode="exact")'
        )
    shape = tuple(rows.shape[: rows.dim() - len(normalized_shape)])
    layout = mode.find(shape, rows, (root,), "rms_norm")
    if layout is None:
        return mode.derive(func, args, kwargs)
    normed = F.rms_norm(rows, normalized_shape, None, eps)
    leaf = mode.dense_leaf(root, "rms_norm", layout)
    groups = mode.rows.groups_along(layout)
    scale = root.detached()
    return apply(StratifiedBroadcast, normed, scale, leaf, True, groups, layout, None, False)


def norm_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules of norms by torch function."""
    rules: dict[Any, BoundaryRule] = dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm)
    rules |= dict.fromkeys((F.group_norm, torch.group_norm), _group_norm)
    return rules | dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm)
