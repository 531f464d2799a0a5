"""Row provenance: where the rows of a tensor are, read off its autograd graph.

Every boundary op notes in its node which dimension of its output holds the rows. From a later
tensor the graph leads back to such a node through views, transposes and elementwise functions,
whose nodes say what they did. It is walked only where sizes alone do not decide, so that ordinary
calls pay nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pinet_fast.aggregation.layout import RowLayout
from pinet_fast.aggregation.strata_index import RowGroups

if TYPE_CHECKING:
    from torch import Tensor


_MAX_NODES = 200

Shape = tuple[int, ...]
Step = Callable[[RowLayout], "RowLayout | None"]


@dataclass
class _Node:
    """One step back: the shape of the input it came from and how a layout moves forward."""

    shape: Shape
    step: Step
    parents: Sequence[Any]


Traced = dict[int, tuple[Any, RowLayout]]
"""Layouts of nodes by identity; the nodes are kept with them, so that no identity is used again."""


LayoutOf = Callable[[Any], "RowLayout | None"]
"""Tells the layout that a compiled boundary noted in its node."""


def trace(
    tensor: Tensor, known: Traced | None = None, layout_of: LayoutOf | None = None
) -> RowLayout | None:
    """Return the row layout of ``tensor`` as its graph tells, or None where it does not.

    Args:
        tensor: The tensor.
        known: What was traced before in this graph; the walk ends there, and what is found is
            added. So the residual stream of a deep model is walked once, not anew at every layer.
        layout_of: Asked about nodes that are not of Python; None where there is no lane.
    """
    node, shape = tensor.grad_fn, tuple(tensor.shape)
    known = {} if known is None else known
    found = _walk(node, shape, [_MAX_NODES], known, layout_of)
    if found is None or not _fits(found, shape):
        return None
    known[id(node)] = (node, found)
    return found


def _walk(
    node: Any, shape: Shape, budget: list[int], known: Traced, layout_of: LayoutOf | None
) -> RowLayout | None:
    # Written out, without functions of its own: every boundary of a forward pays for this.
    while node is not None and budget[0] > 0:
        budget[0] -= 1
        is_same = type(node).__name__ in SAME_SHAPE
        layout = None if is_same else getattr(node, "layout", None)
        if layout is not None and type(layout) is not RowLayout:
            layout = None  # a function of somebody else has an attribute of this name
        if layout is None and layout_of is not None and type(node).__name__ == "CppFunction":
            layout = layout_of(node)
        if layout is None and id(node) in known:
            layout = known[id(node)][1]
        if layout is not None:
            return layout if _fits(layout, shape) else None
        if not is_same:
            break
        parents = []
        for parent, _ in node.next_functions:
            if parent is not None:
                parents.append(parent)  # a comprehension is a call
        for parent in parents[:-1]:
            found = _walk(parent, shape, budget, known, layout_of)
            if found is not None:
                return found
        node = parents[-1] if parents else None
    if node is None or budget[0] <= 0:
        return None
    reader = READERS.get(type(node).__name__)
    back = reader(node, shape) if reader is not None else None
    if back is None:
        return None
    for parent in back.parents:
        found = _walk(parent, back.shape, budget, known, layout_of)
        if found is not None:
            return back.step(found)
    return None


def _fits(layout: RowLayout, shape: Shape) -> bool:
    dim, _, groups, outer, inner = layout
    return dim < len(shape) and shape[dim] == outer * groups.offsets[-1] * inner


def _parents(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def _dim(saved: int, rank: int) -> int:
    """Nodes save negative dimensions as unsigned 64-bit numbers."""
    signed = saved - 2**64 if saved >= 2**63 else saved
    return signed % rank


def _same(node: Any, shape: Shape) -> _Node:
    return _Node(shape, lambda layout: layout, _parents(node))


def _view(node: Any, shape: Shape) -> _Node | None:
    if min(shape, default=0) < 0:  # one part of a concatenation: its width is not known
        return None
    before = tuple(int(size) for size in node._saved_self_sym_sizes)
    return _Node(before, lambda layout: _reshaped(layout, before, shape), _parents(node))


def _reshaped(layout: RowLayout, before: Shape, after: Shape) -> RowLayout | None:
    """Follow the row index through a reshape; None where it is torn across dimensions."""
    stride = layout.inner * math.prod(before[layout.dim + 1 :])
    extent = stride * layout.groups.num_rows
    below = 1
    for dim in range(len(after) - 1, -1, -1):
        reach = below * after[dim]
        if after[dim] > 1 and below <= stride and extent <= reach:
            if stride % below or reach % extent:
                return None
            return layout._replace(dim=dim, outer=reach // extent, inner=stride // below)
        below = reach
    return None


def _transpose(node: Any, shape: Shape) -> _Node:
    rank = len(shape)
    a, b = _dim(node._saved_dim0, rank), _dim(node._saved_dim1, rank)
    return _swapped(node, shape, a, b)


def _t(node: Any, shape: Shape) -> _Node:
    return _swapped(node, shape, 0, 1) if len(shape) == 2 else _same(node, shape)


def _swapped(node: Any, shape: Shape, a: int, b: int) -> _Node:
    before = list(shape)
    before[a], before[b] = before[b], before[a]
    moved = {a: b, b: a}
    return _Node(
        tuple(before),
        lambda layout: layout._replace(dim=moved.get(layout.dim, layout.dim)),
        _parents(node),
    )


def _permute(node: Any, shape: Shape) -> _Node:
    order = [_dim(int(d), len(shape)) for d in node._saved_dims]
    before = [0] * len(shape)
    for after, source in enumerate(order):
        before[source] = shape[after]
    return _Node(
        tuple(before),
        lambda layout: layout._replace(dim=order.index(layout.dim)),
        _parents(node),
    )


def _unsqueeze(node: Any, shape: Shape) -> _Node:
    new = _dim(node._saved_dim, len(shape))
    return _Node(
        shape[:new] + shape[new + 1 :],
        lambda layout: layout._replace(dim=layout.dim + (layout.dim >= new)),
        _parents(node),
    )


def _dropped(node: Any, before: Shape, gone: int) -> _Node:
    """A dimension that disappears: selected, unbound or squeezed away."""

    def step(layout: RowLayout) -> RowLayout | None:
        if layout.dim == gone:
            return None
        return layout._replace(dim=layout.dim - (layout.dim > gone))

    return _Node(before, step, _parents(node))


def _select(node: Any, shape: Shape) -> _Node:
    before = tuple(int(size) for size in node._saved_self_sym_sizes)
    return _dropped(node, before, _dim(node._saved_dim, len(before)))


def _squeeze(node: Any, shape: Shape) -> _Node:
    before = tuple(int(size) for size in node._saved_self_sym_sizes)
    gone = _dim(node._saved_dim, len(before))
    return _dropped(node, before, gone) if before[gone] == 1 else _same(node, shape)


def _part(node: Any, shape: Shape) -> _Node:
    """A slice or split: fine unless it cuts the rows, which ``_fits`` finds out."""
    before = tuple(int(size) for size in node._saved_self_sym_sizes)
    return _Node(before, lambda layout: layout if _fits(layout, shape) else None, _parents(node))


def _expand(node: Any, shape: Shape) -> _Node:
    before = tuple(int(size) for size in node._saved_self_sym_sizes)
    shift = len(shape) - len(before)
    return _Node(before, lambda layout: layout._replace(dim=layout.dim + shift), _parents(node))


def _cat(node: Any, shape: Shape) -> _Node:
    """Parts side by side have the rows of each, unless the rows themselves are concatenated."""
    joined = _dim(node._saved_dim, len(shape))
    before = (*shape[:joined], -1, *shape[joined + 1 :])
    keep: Step = lambda layout: None if layout.dim == joined else layout  # noqa: E731
    return _Node(before, keep, _parents(node))


def _batched_product(node: Any, shape: Shape) -> _Node | None:
    """``bmm`` keeps its first dimension; rows elsewhere would be summed over or exchanged."""
    first = getattr(node, "_saved_self", None)
    if first is None or first.dim() != 3:  # baddbmm saves its factors under other names
        first = getattr(node, "_saved_batch1", None)
    if first is None:
        return None
    factors = _parents(node)[-2:]  # a mask that is added comes before them, where it has a graph
    keep: Step = lambda layout: layout if layout.dim == 0 else None  # noqa: E731
    return _Node(tuple(first.shape), keep, factors[:1])


def _attention(node: Any, shape: Shape) -> _Node:
    """Queries and output have the same shape; rows must be the batch or head dimension."""
    keep: Step = lambda layout: layout if layout.dim < len(shape) - 2 else None  # noqa: E731
    return _Node(shape, keep, _parents(node)[:1])


def _indexed(node: Any, shape: Shape) -> _Node | None:
    """Rows chosen by ids or by a mask: the strata are chosen with them."""
    before = tuple(int(size) for size in node._saved_self_sym_sizes)
    indices: list[Tensor | None] = []
    for index in node._saved_indices:
        if index is not None and index.dtype == torch.bool:
            indices.extend(index.nonzero(as_tuple=True))
        else:
            indices.append(index)
    places = [dim for dim, index in enumerate(indices) if index is not None]
    chosen = [index for index in indices if index is not None]
    if not places or places != list(range(places[0], places[-1] + 1)):
        return None  # advanced indices that are apart move to the front
    if any(index.dim() != 1 for index in chosen):
        return None

    def step(layout: RowLayout) -> RowLayout | None:
        if layout.dim < places[0]:
            return layout
        if layout.dim > places[-1]:
            return layout._replace(dim=layout.dim - len(places) + 1)
        return _chosen(layout, indices[layout.dim], places[0])  # type: ignore[arg-type]

    return _Node(before, step, _parents(node)[:1])


def _index_select(node: Any, shape: Shape) -> _Node:
    before = tuple(int(size) for size in node._saved_self_sym_sizes)
    dim = _dim(node._saved_dim, len(before))

    def step(layout: RowLayout) -> RowLayout | None:
        return layout if layout.dim != dim else _chosen(layout, node._saved_index, dim)

    return _Node(before, step, _parents(node))


def _chosen(layout: RowLayout, index: Tensor, dim: int) -> RowLayout:
    ids = layout.groups.ids.repeat_interleave(layout.inner).repeat(layout.outer)[index]
    return RowLayout(dim, "chosen", RowGroups.from_ids(ids, layout.groups.num_strata))


_ELEMENTWISE = (
    "Abs", "Add", "Clone", "Copy", "Cos", "Cumsum", "Div", "Elu", "Exp", "Gelu", "Hardswish",
    "LeakyRelu", "Log", "LogSigmoid", "LogSoftmax", "MaskedFill", "Mul", "NativeDropout", "Neg",
    "Pow", "Relu", "Rsqrt", "SafeSoftmax", "Sigmoid", "Silu", "Sin", "Softmax", "Softplus",
    "Sqrt", "Sub",
    "Tanh", "ToCopy", "Where", "Alias", "Threshold", "Hardtanh",
)  # fmt: skip

SAME_SHAPE = frozenset(f"{name}Backward{i}" for name in _ELEMENTWISE for i in range(3))

READERS: dict[str, Callable[[Any, Shape], _Node | None]] = {
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "ReshapeAliasBackward0": _view,
    "TransposeBackward0": _transpose,
    "TBackward0": _t,
    "PermuteBackward0": _permute,
    "UnsqueezeBackward0": _unsqueeze,
    "SqueezeBackward1": _squeeze,
    "SelectBackward0": _select,
    "SliceBackward0": _part,
    "SplitBackward0": _part,
    "IndexBackward0": _indexed,
    "IndexSelectBackward0": _index_select,
    "ExpandBackward0": _expand,
    "CatBackward0": _cat,
    "BmmBackward0": _batched_product,
    "BaddbmmBackward0": _batched_product,
    "ScaledDotProductFlashAttentionForCpuBackward0": _attention,
    "ScaledDotProductFlashAttentionBackward0": _attention,
    "ScaledDotProductEfficientAttentionBackward0": _attention,
    "ScaledDotProductCudnnAttentionBackward0": _attention,
}
