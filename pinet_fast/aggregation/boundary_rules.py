"""Boundary rules: which torch functions are rewritten to which stratified op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.boundary import (
    StratifiedBroadcast,
    StratifiedLayerNorm,
    StratifiedLinear,
    StratifiedMatmul,
    StratifiedPReLU,
    apply,
)
from pinet_fast.aggregation.interception import BoundaryRule, Interception, func_name
from pinet_fast.aggregation.slice_rule import slice_rule
from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from pinet_fast.aggregation.leaves import Root

Func = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> Args:
    return input, weight, bias


def _linear(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    rows, weight, bias = bind(_linear_arguments, args, kwargs)
    weight_root, bias_root = mode.root_of(weight), mode.root_of(bias)
    if mode.root_of(rows) is not None:
        raise BoundaryError(
            "linear: expected rows of the batch as the input and a parameter as the weight, got "
            f"{mode.describe([rows, weight])}, the other way round; write "
            "F.linear(rows, parameter).T, or mark what belongs to no user by `with opt.shared():`"
        )
    shape = tuple(rows.shape[:-1])
    layout = mode.find(shape, rows, (weight_root, bias_root), "linear")
    if layout is None:
        return mode.derive(func, args, kwargs)
    rows, weight, bias = autocast(rows, _detached(weight, weight_root), _detached(bias, bias_root))
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
    if root is None or weight.dim() != 2 or rows.dim() < 2:
        raise BoundaryError(
            f"{func_name(func)}: expected rows [*, D_in] times a parameter [D_in, D_out]; got "
            f"{list(rows.shape)} times {list(weight.shape)}; put the rows on the left, as in "
            "`rows @ weight.T`"
        )
    shape = tuple(rows.shape[:-1])
    layout = mode.find(shape, rows, (root,), "matmul")
    if layout is None:
        return mode.derive(func, args, kwargs)
    leaf = mode.dense_leaf(root, "matmul", layout)
    groups = mode.rows.groups_of(layout, shape)
    rows, matrix = autocast(rows, root.detached())
    return apply(StratifiedMatmul, rows, matrix, leaf, groups, layout)


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
    if mode.root_of(rows) is not None:
        raise BoundaryError(
            "layer_norm: expected rows of the batch as the input, got "
            f"{mode.describe([rows])}, and rows as the scale or bias; mark work that belongs to "
            'no user by `with opt.shared():`, or use GradientAggregator(..., mode="exact")'
        )
    normalized = [int(size) for size in normalized_shape]
    shape = tuple(rows.shape[: rows.dim() - len(normalized)])
    weight_root, bias_root = mode.root_of(weight), mode.root_of(bias)
    layout = mode.find(shape, rows, (weight_root, bias_root), "layer_norm")
    if layout is None:
        return mode.derive(func, args, kwargs)
    if rows.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        rows = rows.float()  # autocast runs norms in float32 there; on a CPU as they come
    return apply(
        StratifiedLayerNorm,
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
    return apply(StratifiedBroadcast, normed, root.detached(), leaf, True, groups, layout, None)


def _addmm_arguments(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Args:
    return input, mat1, mat2, beta, alpha


def _addmm(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """``bias + rows W``, the linear layer of those who keep W as [D_in, D_out]."""
    bias, rows, weight, beta, alpha = bind(_addmm_arguments, args, kwargs)
    roots = mode.root_of(bias), mode.root_of(weight)
    is_linear = bias.dim() == 1 and beta == 1 and alpha == 1 and None not in roots
    if not is_linear or mode.root_of(rows) is not None:
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


def _broadcast_arguments(input: Any, other: Any, alpha: Any = 1) -> Args:
    return input, other, alpha


def _broadcast(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """``rows + p``, ``rows - p``, ``rows * p`` and the same with the sides exchanged."""
    left, right, alpha = bind(_broadcast_arguments, args, kwargs)
    if not _is_row_like(mode, left) and not _is_row_like(mode, right):
        return mode.derive(func, args, kwargs)
    if alpha != 1:
        right = mode.derive(torch.mul, (right, alpha), {}) if mode.root_of(right) else right * alpha
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
    out_shape = _broadcast_shape(rows.shape, parameter.shape)
    extra = len(out_shape) - parameter.dim()
    # Dimensions in which the parameter has values of its own cannot be the rows'.
    sizes = tuple(
        size if dim < extra or parameter.shape[dim - extra] == 1 else -1
        for dim, size in enumerate(out_shape)
    )
    layout = mode.find(sizes, rows if rows.shape == out_shape else None, (root,), op)
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
    return apply(StratifiedBroadcast, rows, root.detached(), leaf, multiply, groups, layout, term)


def _is_row_like(mode: Interception, value: Any) -> bool:
    """Return whether a side of a sum may hold rows: no number, root or frozen parameter does."""
    return (
        isinstance(value, Tensor)
        and mode.root_of(value) is None
        and not isinstance(value, torch.nn.Parameter)
    )


def _broadcast_shape(rows: torch.Size, parameter: torch.Size) -> torch.Size:
    """Return the shape of the sum; torch.broadcast_shapes takes 15 us for it."""
    if len(parameter) <= len(rows) and rows[len(rows) - len(parameter) :] == parameter:
        return rows
    return torch.broadcast_shapes(rows, parameter)  # type: ignore[no-any-return, no-untyped-call]


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
    beside = _broadcast(mode, getattr(Tensor, plain), (rows.clone(), *args[1:]), kwargs)
    if beside.shape != rows.shape:
        raise BoundaryError(
            f"{name}: the result {list(beside.shape)} does not fit into {list(rows.shape)}; use "
            f"the form that returns a new tensor, Tensor.{plain}"
        )
    return rows.copy_(beside)


def _detached(value: Tensor | None, root: Root | None) -> Tensor | None:
    """Keep a parameter out of the graph; leave other tensors in it, with their own gradient."""
    return value if root is None else root.detached()


def autocast(*tensors: Any) -> list[Any]:
    """Return tensors as autocast casts them before a matrix product; None stays None.

    Done outside the op, so that its backward runs in the dtypes that it saved, as torch's does.
    """
    if not torch._C._is_any_autocast_enabled():
        return list(tensors)
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    ]


def bind(signature: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Bind call arguments to a signature; functions of torch have none to inspect.

    Args:
        signature: Takes what the function of torch takes, and returns what the rule wants of it.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        BoundaryError: An argument that the boundary op does not know.
    """
    try:
        return signature(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*(type(a).__name__ for a in args), *(f"{k}=" for k in kwargs)])
        raise BoundaryError(
            f"arguments ({given}) are not supported at a boundary: {error}; leave out what is not "
            'known, or use GradientAggregator(..., mode="exact")'
        ) from error


def default_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules by torch function."""
    # They use bind of this file.
    from pinet_fast.aggregation.lookup_rules import lookup_rules
    from pinet_fast.aggregation.recurrent_rules import recurrent_rules

    rules: dict[Any, BoundaryRule] = {F.linear: _linear, F.layer_norm: _layer_norm}
    rules |= dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm)
    rules |= dict.fromkeys((torch.addmm, Tensor.addmm), _addmm)
    rules |= dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), _prelu)
    rules |= lookup_rules()
    rules |= recurrent_rules()
    for name in ("matmul", "mm"):
        rules[getattr(torch, name)] = rules[getattr(Tensor, name)] = _matmul
    rules[Tensor.__matmul__] = _matmul
    for name in ("add", "sub", "subtract", "mul", "multiply"):
        rules[getattr(torch, name)] = rules[getattr(Tensor, name)] = _broadcast
    for name in ("__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__rsub__"):
        rules[getattr(Tensor, name)] = _broadcast
    for name in ("__iadd__", "__isub__", "__imul__", "add_", "sub_", "mul_"):
        rules[getattr(Tensor, name)] = _in_place
    return rules
