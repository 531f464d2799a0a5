"""Boundary rule of convolutions over time: ``conv1d``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.boundary import apply
from pinet_fast.aggregation.convolution import StratifiedConv1d, Window
from pinet_fast.aggregation.rule_arguments import Args, Func, Kwargs, autocast, bind, detached
from pinet_fast.aggregation.slice_rule import slice_rule

if TYPE_CHECKING:
    from pinet_fast.aggregation.interception import BoundaryRule, Interception


def _arguments(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Args:
    return input, weight, bias, stride, padding, dilation, groups


def _conv1d(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """Rows are dimension 0 by definition; without it, as for one sequence, the slice rule."""
    rows, weight, bias, stride, padding, dilation, groups = bind(_arguments, args, kwargs)
    roots = mode.root_of(weight), mode.root_of(bias)
    padded = _padding(padding, stride, dilation, weight)
    layout = None
    is_usual = rows.dim() == 3 and padded is not None and not weight.is_complex()
    if mode.root_of(rows) is None and is_usual:
        layout = mode.find((rows.shape[0], -1, -1), rows, roots, "conv1d")
    if layout is None or padded is None:
        return slice_rule(mode, func, args, kwargs)
    before, after = padded
    if before != after:  # an even kernel and padding="same", as torch does it
        rows = F.pad(rows, (0, after - before))
    rows, weight, bias = autocast(rows, detached(weight, roots[0]), detached(bias, roots[1]))
    return apply(
        StratifiedConv1d,
        rows,
        weight,
        bias,
        mode.dense_leaf(roots[0], "conv1d", layout),
        mode.dense_leaf(roots[1], "conv1d", layout),
        Window(_number(stride), before, _number(dilation), groups),
        mode.rows.groups_along(layout),
        layout,
    )


def _padding(padding: Any, stride: Any, dilation: Any, weight: Tensor) -> tuple[int, int] | None:
    """Return the zeros in front and behind; None for what torch refuses."""
    if not isinstance(padding, str):
        return _number(padding), _number(padding)
    if padding == "same" and _number(stride) == 1 and weight.dim() == 3:
        total = _number(dilation) * (weight.shape[2] - 1)
        return total // 2, total - total // 2
    return (0, 0) if padding == "valid" else None


def _number(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def convolution_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules of convolutions by torch function."""
    return {torch.conv1d: _conv1d}
