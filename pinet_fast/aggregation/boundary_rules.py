"""Boundary rules: which torch functions are rewritten to which stratified op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.boundary import (
    StratifiedGroupNorm,
    StratifiedLayerNorm,
    StratifiedLinear,
    StratifiedMatmul,
    apply,
)
from pinet_fast.aggregation.broadcast import StratifiedBroadcast, StratifiedPReLU
from pinet_fast.aggregation.slice_rule import slice_rule
from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from pinet_fast.aggregation.interception import BoundaryRule, Interception
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
    rows, weight, bias = autocast(rows, detached(weight, weight_root), detached(bias, bias_root))
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
        return slice_rule(mode, func, args, kwargs)  # the parameter on the left, one a head, ...
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
        detached(weight, weight_root),
        detached(bias, bias_root),
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


def detached(value: Tensor | None, root: Root | None) -> Tensor | None:
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
    from pinet_fast.aggregation.broadcast_rules import broadcast_rules
    from pinet_fast.aggregation.convolution_rules import convolution_rules
    from pinet_fast.aggregation.lookup_rules import lookup_rules
    from pinet_fast.aggregation.product_rules import product_rules
    from pinet_fast.aggregation.recurrent_rules import recurrent_rules

    rules: dict[Any, BoundaryRule] = {F.linear: _linear, F.layer_norm: _layer_norm}
    rules |= dict.fromkeys((F.group_norm, torch.group_norm), _group_norm)
    rules |= dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm)
    rules |= dict.fromkeys((torch.addmm, Tensor.addmm), _addmm)
    rules |= dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), _prelu)
    rules |= broadcast_rules()
    rules |= convolution_rules()
    rules |= lookup_rules()
    rules |= product_rules()
    rules |= recurrent_rules()
    for name in ("matmul", "mm"):
        rules[getattr(torch, name)] = rules[getattr(Tensor, name)] = _matmul
    rules[Tensor.__matmul__] = _matmul
    return rules
