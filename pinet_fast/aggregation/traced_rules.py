"""Boundary rules as a compiler traces them: ordinary functions of detached parameters, and taps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.composites import OPENED, opened
from pinet_fast.aggregation.trace_plan import (
    ADDITIONS,
    DERIVING,
    DIFFERENCES,
    MATMULS,
    PRODUCTS,
)
from pinet_fast.aggregation.traced_ops import ProductTap, SumTap, WeightTap

if TYPE_CHECKING:
    from collections.abc import Callable

    from pinet_fast.aggregation.trace import Trace

_ATTENTION = opened(F.multi_head_attention_forward)


def traced_call(
    mode: Any, trace: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Stratify one call inside a compiled graph."""
    if not torch.is_grad_enabled():
        return _plainly(func, args, kwargs)
    tensors: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors.extend([inner for inner in value if isinstance(inner, Tensor)])
    founds = [trace.find(t) for t in tensors]
    sources = [i for found in founds if found is not None for i in trace.sources(found)]
    if not sources:
        return _plainly(func, args, kwargs)
    if func in OPENED:
        with mode:
            return _ATTENTION(*args, **kwargs)
    if None not in founds and func in DERIVING:
        return trace.derive(func, args, kwargs, tuple(sorted(set(sources))))
    if func is F.linear:
        return _linear(trace, *args, **kwargs)
    if func in MATMULS and len(args) == 2:
        return _matmul(trace, func, *args)
    if func is F.layer_norm:
        return _layer_norm(trace, *args, **kwargs)
    if func is F.embedding:
        return _embedding(trace, *args, **kwargs)
    if func in ADDITIONS and len(args) == 2 and not kwargs:
        return _sum(trace, func, "add", 1, *args)
    if func in DIFFERENCES and len(args) == 2 and not kwargs:
        return _sum(trace, func, "sub", -1, *args)
    if func in PRODUCTS and len(args) == 2 and not kwargs:
        return _product(trace, func, *args)
    out = _plainly(func, args, kwargs)
    if isinstance(out, Tensor) and out.requires_grad:
        torch._dynamo.graph_break("a function without a traced form meets a parameter")
    return out


def _tap(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


def _plainly(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is Tensor.unflatten:  # written with super(), which Dynamo cannot trace this way
        return args[0].unflatten(*args[1:], **kwargs)
    return func(*args, **kwargs)


def _linear(trace: Trace, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    of_weight, of_bias = trace.find(weight), trace.find(bias)
    out = F.linear(
        input,
        weight if of_weight is None else weight.detach(),
        bias if bias is None or of_bias is None else bias.detach(),
    )
    shape = input.shape[:-1]
    if of_weight is not None:
        layout = trace.flat_place(of_weight, "linear", shape)
        out = _tap(WeightTap, out, input, trace.virtual(of_weight), trace.key, *layout)
    if of_bias is not None:
        kind, outer, inner = trace.flat_place(of_bias, "linear", shape)
        leaf = trace.virtual(of_bias)
        flat = out.reshape(-1, out.shape[-1])
        flat = _tap(SumTap, flat, leaf, trace.key, kind, outer, inner, 0, [], 1)
        out = flat.reshape(out.shape)
    return out


def _matmul(trace: Trace, func: Callable[..., Any], input: Tensor, weight: Tensor) -> Tensor:
    found = trace.find(weight)
    if found is None or trace.find(input) is not None:
        torch._dynamo.graph_break("a product with the parameter on the left")
        raise AssertionError
    layout = trace.flat_place(found, "matmul", input.shape[:-1])
    out = func(input, weight.detach())
    leaf = trace.virtual(found).transpose(1, 2)
    return _tap(WeightTap, out, input, leaf, trace.key, *layout)


def _layer_norm(
    trace: Trace,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out = F.layer_norm(input, normalized_shape, None, None, eps)
    rank = len(normalized_shape)
    if weight is not None:
        out = _scaled(trace, torch.mul, out, weight, "layer_norm", rank)
    if bias is not None:
        out = _shifted(trace, torch.add, out, bias, "layer_norm", rank)
    return out


def _sum(
    trace: Trace, func: Callable[..., Any], op: str, sign: int, left: Any, right: Any
) -> Tensor:
    if trace.find(right) is not None:
        return _shifted(trace, func, left, right, op, 0, sign)
    return _shifted(trace, func, right, left, op, 0, swap=True)


def _product(trace: Trace, func: Callable[..., Any], left: Any, right: Any) -> Tensor:
    if trace.find(right) is not None:
        return _scaled(trace, func, left, right, "mul", 0)
    return _scaled(trace, func, right, left, "mul", 0)


def _shifted(
    trace: Trace,
    func: Callable[..., Any],
    rows: Tensor,
    parameter: Tensor,
    op: str,
    rank: int,
    sign: int = 1,
    swap: bool = False,
) -> Tensor:
    """Return ``func(rows, parameter)`` with the stratum gradients of the parameter."""
    found = trace.find(parameter)
    constant = parameter.detach()
    out = func(constant, rows) if swap else func(rows, constant)
    if found is None:
        plain: Tensor = func(parameter, rows) if swap else func(rows, parameter)
        return plain
    place, reduced = _broadcast_place(trace, found, op, out, parameter, rank)
    leaf = trace.virtual(found)
    return _tap(SumTap, out, leaf, trace.key, *place, reduced, sign)


def _scaled(
    trace: Trace,
    func: Callable[..., Any],
    rows: Tensor,
    parameter: Tensor,
    op: str,
    rank: int,
) -> Tensor:
    """Return ``rows * parameter`` with the stratum gradients of the parameter."""
    found = trace.find(parameter)
    if found is None:
        return torch.mul(rows, parameter)
    out = torch.mul(rows, parameter.detach())
    place, reduced = _broadcast_place(trace, found, op, out, parameter, rank)
    leaf = trace.virtual(found)
    return _tap(ProductTap, out, rows, leaf, trace.key, *place, reduced)


def _broadcast_place(
    trace: Trace, found: Any, op: str, out: Tensor, parameter: Tensor, rank: int
) -> tuple[tuple[int, int, int, int], list[int]]:
    """Return (kind, outer, inner, row dim) and the other dimensions that broadcasting added."""
    kind, outer, inner, dim = trace.place(found, op, out.shape[: out.dim() - rank])
    extra = out.dim() - parameter.dim()
    reduced = [
        k for k in range(out.dim()) if k != dim and (k < extra or parameter.shape[k - extra] == 1)
    ]
    return (kind, outer, inner, dim), reduced


def _embedding(
    trace: Trace,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    found = trace.find(weight)
    if found is None or found[0] < 0 or max_norm is not None or scale_grad_by_freq:
        torch._dynamo.graph_break("a lookup without a traced form")
        raise AssertionError
    position = found[0]
    number = trace.num_looked_up[position]
    if number >= len(trace.lookups[position]):
        torch._dynamo.graph_break("more lookups in a table than before")
    trace.num_looked_up[position] = number + 1
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    layout = trace.flat_place(found, "embedding", input.shape)
    leaf, place = trace.lookups[position][number]
    out: Tensor = torch.ops.pinet_fast.traced_lookup(
        weight.detach(), leaf, input, trace.key, *layout, padding, place, trace.num_strata
    )
    return out
