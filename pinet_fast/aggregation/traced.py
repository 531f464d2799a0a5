"""The interception inside compiled graphs: what Dynamo traces where eager steps run ``Interception``.

Everything in ``Trace`` is traced: plain loops, identities of tensors, sizes. Parameters take part
detached; taps (``traced_ops``) hand their stratum gradients to virtual leaves that the session made
before. A tensor computed from parameters is computed again from each stratum's slice of the leaves:
its forward is dead code and only the way back remains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code

from pinet_fast.aggregation.composites import OPENED, opened
from pinet_fast.aggregation.interception import Interception, func_name
from pinet_fast.aggregation.trace_plan import (
    ADDITIONS,
    DERIVING,
    DIFFERENCES,
    MATMULS,
    PRODUCTS,
    TracePlan,
)
from pinet_fast.aggregation.traced_ops import KINDS, ProductTap, SumTap, WeightTap, key_of

if TYPE_CHECKING:
    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.leaves import Root, Term

_compiling_frames = torch._C._dynamo.eval_frame.get_eval_frame_callback
_uncompiled = torch._dynamo.disable(Interception.__torch_function__)
_ATTENTION = opened(F.multi_head_attention_forward)


class TraceableInterception(Interception):
    """An interception that a compiler may trace once the plan is ready; until then it writes it.

    Args:
        plan: The plan, kept by the aggregator.
    """

    plan: TracePlan
    trace: Trace | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.compiler.is_compiling():
            return traced_call(self, self.trace, func, args, kwargs or {})
        if _compiling_frames() is not None:  # between the graphs of a model that has several
            return _uncompiled(self, func, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def begin(self, plan: TracePlan) -> bool:
        """Begin a step; return whether its compiled graphs stratify.

        Where they do not yet, models are to run eagerly, and the plan is completed.
        """
        self.plan = plan
        is_proven = all(step is not None for _, step in self._check.coverage())
        if self._check.mode != "always" and is_proven and plan.is_ready(self.parameters):
            self.trace = Trace(self)
            return True
        plan.begin(self.parameters)
        self._num_lookups: dict[int, int] = {}
        return False

    # What an eager step sees --------------------------------------------------------------------

    def _boundary_or_derived(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        known = len(self._occurrences)
        out = super()._boundary_or_derived(func, args, kwargs)
        if self.trace is None and len(self._occurrences) != known:
            self.plan.note_call(func, func_name(func))
        return out

    def derive(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        known = len(self._roots)
        out = super().derive(func, args, kwargs)
        if self.trace is None and len(self._roots) != known:
            if self.is_shared:
                self.plan.refuse("shared() marks work inside")
            roots = [self._roots.get(id(a)) for a in args if isinstance(a, Tensor)]
            of_parameters = all(root is not None and root.is_parameter for root in roots)
            self.plan.note_derived(func, func_name(func), of_parameters=of_parameters)
        return out

    def _site(self, root: Root, op: str, layout: RowLayout, is_sliced: bool = False) -> Any:
        if self.trace is None:
            self.plan.note_role(root.sources, op, layout, is_sliced=is_sliced)
            if self.saw_hooks:
                self.plan.refuse("activation checkpointing")
        return super()._site(root, op, layout, is_sliced)

    def dense_leaf(
        self, root: Root | None, op: str, layout: RowLayout, *, is_sliced: bool = False
    ) -> Tensor | None:
        if self.trace is None and root is not None:
            self.plan.dense.update(root.sources)
        return super().dense_leaf(root, op, layout, is_sliced=is_sliced)

    def lookup_leaf(
        self, root: Root, op: str, layout: RowLayout, is_sparse: bool = False
    ) -> Tensor:
        if self.trace is None:
            source = root.sources[0]
            count = self._num_lookups[source] = self._num_lookups.get(source, 0) + 1
            most, was_sparse = self.plan.lookups.get(source, (0, True))
            self.plan.lookups[source] = max(most, count), is_sparse and was_sparse
            if not root.is_parameter or op != "embedding":
                self.plan.refuse(f"{op} of a table that is no plain parameter")
        return super().lookup_leaf(root, op, layout, is_sparse)

    def term_leaf(self, root: Root, op: str, layout: RowLayout) -> Term:
        if self.trace is None:
            self.plan.refuse("a penalty on parameters is added to losses")
        return super().term_leaf(root, op, layout)

    def _term_leaf(self, value: Any) -> Any:
        if self.trace is None:
            self.plan.refuse("a penalty on parameters is added to losses")
        return super()._term_leaf(value)


# The hand-over itself is no code to compile: it is traced as a part of the model, or run.
skip_code(TraceableInterception.__torch_function__.__code__)


# What a compiler traces -------------------------------------------------------------------------


class Trace:
    """What traced code reads: parameters, leaves and roles of one step, and the batch's sizes.

    Args:
        mode: The interception of the step, whose plan is ready.
    """

    def __init__(self, mode: TraceableInterception) -> None:
        roots = [mode._roots[id(p)] for p in mode.parameters]
        plan, leaves, strata = mode.plan, mode.leaves, mode.rows.strata
        self.parameters = list(mode.parameters)
        self.leaves = [
            leaves.dense(root) if i in plan.dense else None for i, root in enumerate(roots)
        ]
        self.lookups: list[list[tuple[Tensor, int]]] = [[] for _ in roots]
        number = 0
        for source, (count, is_sparse) in sorted(plan.lookups.items()):
            leaves.note_lookup(roots[source], is_sparse)
            for _ in range(count):
                leaf = leaves.delivered_lookup(roots[source], mode.rows.delivered, number)
                self.lookups[source].append((leaf, number))
                number += 1
        self.num_looked_up = [0 for _ in roots]
        self.roles = plan.roles
        self.num_strata = leaves.num_strata
        self.key = key_of(mode.rows)
        self.users = strata.users.ids
        self.events = strata.users.ids if strata.events is None else strata.events.ids
        self.derived: list[tuple[Any, ...]] = []

    # Who is who ---------------------------------------------------------------------------------

    def find(self, value: Any) -> tuple[int, int, bool] | None:
        """Return (parameter or -1, derived or -1, is its transpose) of a root, or None."""
        if not isinstance(value, Tensor):
            return None
        if isinstance(value, nn.Parameter):
            for i, p in enumerate(self.parameters):
                if value is p:
                    return i, -1, False
            return None
        for k, entry in enumerate(self.derived):
            if value is entry[0]:
                return -1, k, False
        base = value._base
        if base is not None and isinstance(base, nn.Parameter):
            for i, p in enumerate(self.parameters):
                if base is p:  # made by `.T`, which modes are not shown, or before the graph
                    if value.dim() == 2 and p.dim() == 2 and value.stride() == p.stride()[::-1]:
                        return i, -1, True
                    torch._dynamo.graph_break(_VIEW)
        return None

    def sources(self, found: tuple[int, int, bool]) -> tuple[int, ...]:
        """Return the positions of the parameters that a root is computed from."""
        sources: tuple[int, ...] = self.derived[found[1]][5] if found[1] >= 0 else (found[0],)
        return sources

    def virtual(self, found: tuple[int, int, bool]) -> Tensor:
        """Return the virtual tensor [S, *shape] of a root."""
        position, k, is_transposed = found
        if position >= 0:
            leaf = self.leaves[position]
            if leaf is None:
                torch._dynamo.graph_break("a parameter meets rows where none did before")
                raise AssertionError
            return leaf.transpose(1, 2) if is_transposed else leaf
        _, func, args, kwargs, place, _ = self.derived[k]
        virtuals = [self._virtual_or_none(a) for a in args]
        slices = []
        for s in range(self.num_strata):
            parts = [
                self._slice_of(a, v, s) for a, v in zip(args, virtuals, strict=True)
            ]
            out = func(*parts, **kwargs)
            slices.append(out if place < 0 else out[place])
        return torch.stack(slices)

    def _virtual_or_none(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._virtual_or_none(v) for v in value]
        found = self.find(value)
        return None if found is None else self.virtual(found)

    def _slice_of(self, value: Any, virtual: Any, stratum: int) -> Any:
        if isinstance(virtual, list):
            return type(value)(
                [self._slice_of(v, w, stratum) for v, w in zip(value, virtual, strict=True)]
            )
        return value if virtual is None else virtual[stratum]

    def derive(self, func: Callable[..., Any], args: Any, kwargs: Any, sources: Any) -> Any:
        """Compute with parameters alone; nothing differentiates through the outcome."""
        with torch.no_grad():
            out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self.derived.append((out, func, args, kwargs, -1, sources))
        else:
            for place, part in enumerate(out):
                self.derived.append((part, func, args, kwargs, place, sources))
        return out

    # Rows ---------------------------------------------------------------------------------------

    def place(
        self, found: tuple[int, int, bool], op: str, shape: Sequence[int]
    ) -> tuple[int, int, int, int]:
        """Return (kind, outer, inner) of what is flattened into the row dimension, and that.

        Args:
            found: The root that meets rows.
            op: The op, as the leak check names it.
            shape: Sizes of the dimensions that can hold rows.
        """
        role = self.roles.get((self.sources(found), op))
        if role is None or role[1] >= len(shape):
            torch._dynamo.graph_break("rows meet a parameter as they never did before")
            raise AssertionError
        kind, dim, flat = role
        count = (self.users if kind == "users" else self.events).shape[0]
        outer, inner = 1, 1
        if flat == "outer":
            outer = shape[dim] // count
        if flat == "inner":
            inner = shape[dim] // count
        if outer * inner * count != shape[dim]:
            torch._dynamo.graph_break("another dimension than before holds the rows")
        return KINDS.index(kind), outer, inner, dim

    def flat_place(
        self, found: tuple[int, int, bool], op: str, shape: Sequence[int]
    ) -> tuple[int, int, int]:
        """Return (kind, outer, inner) of a tensor flattened to [N, ...]."""
        kind, outer, inner, dim = self.place(found, op, shape)
        for size in shape[:dim]:
            outer = outer * size
        for size in shape[dim + 1 :]:
            inner = inner * size
        return kind, outer, inner


_VIEW = "a view of a parameter that was made outside the graph"


def traced_call(
    mode: Any, trace: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Stratify one call inside a compiled graph."""
    if not torch.is_grad_enabled():
        return _plainly(func, args, kwargs)
    tensors = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            for inner in value:
                if isinstance(inner, Tensor):
                    tensors.append(inner)
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
    return _plainly(func, args, kwargs)  # its gradient would be found outside every boundary


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
        out = WeightTap.apply(out, input, trace.virtual(of_weight), trace.key, *layout)
    if of_bias is not None:
        kind, outer, inner = trace.flat_place(of_bias, "linear", shape)
        leaf = trace.virtual(of_bias)
        flat = out.reshape(-1, out.shape[-1])
        flat = SumTap.apply(flat, leaf, trace.key, kind, outer, inner, 0, [], 1)
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
    return WeightTap.apply(out, input, leaf, trace.key, *layout)


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
        return func(parameter, rows) if swap else func(rows, parameter)
    place, reduced = _broadcast_place(trace, found, op, out, parameter, rank)
    leaf = trace.virtual(found)
    return SumTap.apply(out, leaf, trace.key, *place, reduced, sign)


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
    return ProductTap.apply(out, rows, leaf, trace.key, *place, reduced)


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
    return torch.ops.pinet_fast.traced_lookup(
        weight.detach(), leaf, input, trace.key, *layout, padding, place, trace.num_strata
    )
