"""Boundary rules of linear layers: ``linear``, ``matmul`` and ``mm``, ``addmm``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.boundary import StratifiedLinear, StratifiedMatmul, apply
from pinet_fast.aggregation.rule_arguments import Args, Func, Kwargs, autocast, bind
from pinet_fast.aggregation.slice_rule import slice_rule
from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from pinet_fast.aggregation.interception import BoundaryRule, Interception


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> Args:
    return input, weight, bias


def _linear(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    # As nn.Linear calls it. Linear layers are most of the boundaries, so calls are spared here.
    rows, weight, bias = (
        args if len(args) == 3 and not kwargs else bind(_linear_arguments, args, kwargs)
    )
    roots = mode.by_id
    weight_root = roots.get(id(weight)) or mode.root_of(weight)
    bias_root = None if bias is None else roots.get(id(bias)) or mode.root_of(bias)
    if id(rows) in roots or (rows._base is not None and mode.root_of(rows) is not None):
        raise BoundaryError(
            "linear: expected rows of the batch as the input and a parameter as the weight, got "
            f"{mode.describe([rows, weight])}, the other way round; write "
            "F.linear(rows, parameter).T, or mark what belongs to no user by `with opt.shared():`"
        )
    if weight.is_complex():  # our kernels take real numbers, here and below
        return slice_rule(mode, func, args, kwargs)
    shape = tuple(rows.shape[:-1])
    layout = mode.find(shape, rows, (weight_root, bias_root), "linear")
    if layout is None:
        return mode.derive(func, args, kwargs)
    weight = weight if weight_root is None else weight_root.detached()
    bias = bias if bias_root is None else bias_root.detached()
    if torch._C._is_any_autocast_enabled():
        rows, weight, bias = autocast(rows, weight, bias)
    return apply(
        StratifiedLinear,
        rows,
        weight,
        bias,
        mode.dense_leaf(weight_root, "linear", layout),
        mode.dense_leaf(bias_root, "linear", layout),
        mode.rows.groups_of(layout, shape),
        layout,
    )


def _matmul_arguments(input: Any, other: Any = None, *, mat2: Any = None) -> Args:
    return input, mat2 if other is None else other


def _matmul(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    rows, weight = bind(_matmul_arguments, args, kwargs)
    root = mode.root_of(weight)
    if root is None or weight.dim() != 2 or rows.dim() < 2 or weight.is_complex():
        return slice_rule(mode, func, args, kwargs)  # the parameter on the left, one a head, ...
    shape = tuple(rows.shape[:-1])
    layout = mode.find(shape, rows, (root,), "matmul")
    if layout is None:
        return mode.derive(func, args, kwargs)
    leaf = mode.dense_leaf(root, "matmul", layout)
    groups = mode.rows.groups_of(layout, shape)
    rows, matrix = autocast(rows, root.detached())
    return apply(StratifiedMatmul, rows, matrix, leaf, groups, layout)


def _addmm_arguments(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Args:
    return input, mat1, mat2, beta, alpha


def _addmm(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """``bias + rows W``, the linear layer of those who keep W as [D_in, D_out]."""
    bias, rows, weight, beta, alpha = bind(_addmm_arguments, args, kwargs)
    roots = mode.root_of(bias), mode.root_of(weight)
    is_linear = bias.dim() == 1 and beta == 1 and alpha == 1 and None not in roots
    if not is_linear or weight.is_complex() or mode.root_of(rows) is not None:
        return slice_rule(mode, func, args, kwargs)
    layout = mode.find((rows.shape[0],), rows, roots, "addmm")
    if layout is None:
        return mode.derive(func, args, kwargs)
    leaves = [mode.dense_leaf(root, "addmm", layout) for root in roots]
    assert leaves[1] is not None
    rows, weight, bias = autocast(rows, roots[1].detached(), roots[0].detached())  # type: ignore[union-attr]
    groups = mode.rows.groups_of(layout, (rows.shape[0],))
    return apply(
        StratifiedLinear, rows, weight.t(), bias, leaves[1].transpose(1, 2), leaves[0], groups,
        layout,
    )  # fmt: skip


def linear_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules of linear layers by torch function."""
    rules: dict[Any, BoundaryRule] = {F.linear: _linear}
    rules |= dict.fromkeys((torch.addmm, Tensor.addmm), _addmm)
    matmuls = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
    return rules | dict.fromkeys(matmuls, _matmul)
