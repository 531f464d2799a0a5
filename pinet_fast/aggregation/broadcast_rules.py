"""Boundary rules of broadcasting: ``rows + p``, ``- p``, ``* p``, ``/ p``, and ``prelu``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.boundary import apply
from pinet_fast.aggregation.broadcast import (
    StratifiedBroadcast,
    StratifiedDivision,
    StratifiedPReLU,
)
from pinet_fast.aggregation.roots import func_name
from pinet_fast.aggregation.rule_arguments import Args, Func, Kwargs, autocast, bind
from pinet_fast.aggregation.slice_rule import slice_rule
from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from pinet_fast.aggregation.interception import BoundaryRule, Interception
    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.leaves import Root


def _broadcast_arguments(input: Any, other: Any, alpha: Any = 1) -> Args:
    return input, other, alpha


def _broadcast(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """``rows + p``, ``rows - p``, ``rows * p`` and the same with the sides exchanged."""
    left, right, alpha = bind(_broadcast_arguments, args, kwargs)
    op, is_exchanged = _operation(func)
    of_left, of_right = mode.root_of(left), mode.root_of(right)
    meets_rows = (of_left is None and _is_row_like(left)) or (
        of_right is None and _is_row_like(right)
    )
    if not meets_rows:
        return mode.derive(func, args, kwargs)
    if alpha != 1:
        right = right * alpha if of_right is None else mode.derive(torch.mul, (right, alpha), {})
        of_right = mode.root_of(right)
    if is_exchanged:
        left, right, of_left, of_right = right, left, of_right, of_left
    if op in ("sub", "subtract"):
        # x - p = x + (-p), exactly: the negation is batch-free or row-wise, whichever side it is.
        right = -right if of_right is None else mode.derive(torch.neg, (right,), {})
        of_right = mode.root_of(right)
    root = of_right if of_left is None else of_left
    if root is None:
        raise BoundaryError(f"{op}: expected rows of the batch and one parameter")
    rows, parameter = (left, right) if of_left is None else (right, left)
    layout = _layout_of(mode, rows, parameter, root, op)
    if layout is None:
        return mode.derive(func, args, kwargs)
    multiply = op in ("mul", "multiply")
    term = None
    if multiply or root.is_parameter or parameter.numel() != 1:
        leaf = mode.dense_leaf(root, op, layout)
    else:
        term = mode.term_leaf(root, op, layout)
        leaf = term.leaf
    groups = mode.rows.groups_along(layout)
    return apply(
        StratifiedBroadcast, rows, root.detached(), leaf, multiply, groups, layout, term,
        of_left is not None,
    )  # fmt: skip


def _layout_of(
    mode: Interception, rows: Any, parameter: Tensor, root: Root, op: str
) -> RowLayout | None:
    """Return the layout of the result of broadcasting."""
    own = tuple(parameter.shape)  # a slice of a torch.Size takes 1 us
    sizes = _broadcast_shape(tuple(rows.shape), own)
    extra = len(sizes) - len(own)
    # Dimensions in which the parameter has values of its own cannot be the rows'.
    if 1 in own:
        beside = tuple(sizes[extra + dim] if n == 1 else -1 for dim, n in enumerate(own))
    else:
        beside = (-1,) * len(own)
    sizes = sizes[:extra] + beside
    # Their graph tells where rows are as long as no dimension is put in front of theirs.
    return mode.find(sizes, rows if rows.dim() == len(sizes) else None, (root,), op)


def _division_arguments(input: Any, other: Any, *, rounding_mode: Any = None) -> Args:
    return input, other, rounding_mode


def _division(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """``rows / p`` and ``p / rows``; not as a product with 1 / p, which rounds otherwise."""
    above, below, rounding = bind(_division_arguments, args, kwargs)
    root_above, root_below = mode.root_of(above), mode.root_of(below)
    rows, root = (below, root_above) if root_below is None else (above, root_below)
    are_rows = root is not None and mode.root_of(rows) is None and _is_row_like(rows)
    if rounding is not None or root is None or not are_rows:
        return slice_rule(mode, func, args, kwargs)
    layout = _layout_of(mode, rows, root.tensor, root, "div")
    if layout is None:
        return slice_rule(mode, func, args, kwargs)
    leaf = mode.dense_leaf(root, "div", layout)
    groups = mode.rows.groups_along(layout)
    by_rows = root_below is None
    return apply(StratifiedDivision, rows, root.detached(), leaf, by_rows, groups, layout)


def _reversed_division(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """``below.__rtruediv__(above)``, which torch computes as ``(1 / below) * above``."""
    below, above = args
    if mode.root_of(below) is not None:
        inverse = mode.derive(torch.reciprocal, (below,), {})
    else:
        inverse = below.reciprocal()
    return _broadcast(mode, torch.mul, (inverse, above), kwargs)


def _is_row_like(value: Any) -> bool:
    """Return whether what is no root may hold rows: no number or frozen parameter does."""
    if type(value) is Tensor:  # what follows takes 1 us
        return True
    return isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)


@functools.cache
def _operation(func: Func) -> tuple[str, bool]:
    """Return what a function computes, and whether its sides are exchanged in a difference."""
    name = func_name(func)
    return name.strip("_").removeprefix("r"), name == "__rsub__"


def _broadcast_shape(rows: tuple[int, ...], parameter: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the sum; torch.broadcast_shapes takes 15 us for it."""
    if len(parameter) <= len(rows) and rows[len(rows) - len(parameter) :] == parameter:
        return rows
    return tuple(torch.broadcast_shapes(rows, parameter))  # type: ignore[no-untyped-call]


def _in_place(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """``rows += p`` and its kin: computed beside the rows, then written into them."""
    if not args or mode.root_of(args[0]) is not None:
        raise BoundaryError(
            f"{func_name(func)}: works in place on a parameter; use the form that returns a new "
            "tensor"
        )
    name = func_name(func)
    plain = f"__{name.strip('_')[1:]}__" if name.startswith("__") else name.removesuffix("_")
    rows = args[0]
    rule = _division if plain.strip("_") in _DIVISIONS else _broadcast
    beside = rule(mode, getattr(Tensor, plain), (rows.clone(), *args[1:]), kwargs)
    if beside.shape != rows.shape:
        raise BoundaryError(
            f"{name}: the result {list(beside.shape)} does not fit into {list(rows.shape)}; use "
            f"the form that returns a new tensor, Tensor.{plain}"
        )
    return rows.copy_(beside)


_DIVISIONS = ("div", "divide", "true_divide", "truediv")


def _prelu_arguments(input: Any, weight: Any) -> Args:
    return input, weight


def _prelu(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    rows, weight = bind(_prelu_arguments, args, kwargs)
    root = mode.root_of(weight)
    if root is None or mode.root_of(rows) is not None:
        raise BoundaryError(
            "prelu: expected rows of the batch and a parameter as the weight, got "
            f"{mode.describe([rows, weight])}; mark work that belongs to no user by "
            '`with opt.shared():`, or use GradientAggregator(..., mode="exact")'
        )
    sizes = list(rows.shape)
    if weight.numel() > 1:
        sizes[1] = -1  # channels
    layout = mode.find(tuple(sizes), rows, (root,), "prelu")
    if layout is None:
        return mode.derive(func, args, kwargs)
    leaf = mode.dense_leaf(root, "prelu", layout)
    groups = mode.rows.groups_along(layout)
    rows, slope = autocast(rows, root.detached())
    return apply(StratifiedPReLU, rows, slope, leaf, groups, layout)


def broadcast_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules of broadcasting by torch function."""
    rules: dict[Any, BoundaryRule] = {}
    for name in ("add", "sub", "subtract", "mul", "multiply"):
        rules[getattr(torch, name)] = rules[getattr(Tensor, name)] = _broadcast
    for name in ("__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__rsub__"):
        rules[getattr(Tensor, name)] = _broadcast
    for name in ("div", "divide", "true_divide"):
        rules[getattr(torch, name)] = rules[getattr(Tensor, name)] = _division
    rules[Tensor.__truediv__] = _division
    rules[Tensor.__rtruediv__] = _reversed_division
    for name in (
        "__iadd__", "__isub__", "__imul__", "__itruediv__", "add_", "sub_", "mul_", "div_",
        "divide_", "true_divide_",
    ):  # fmt: skip
        rules[getattr(Tensor, name)] = _in_place
    return rules | dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), _prelu)
