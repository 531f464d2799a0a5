"""The slice rule: stratum gradients of any row-independent function, by calling it once a stratum.

A function without a boundary rule is called on the rows of each stratum with that stratum's slice
of the virtual leaves, and the outputs are put together again: one pass in FLOPs, S launches. That
is right only if rows do not influence each other. On the first use of a call site the outputs are
compared with one call on the whole batch, which catches what the leak check cannot see: a sliced
BatchNorm has other statistics and leaks nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pinet_fast.errors import BoundaryError, RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pinet_fast.aggregation.interception import Interception
    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.leaves import Root
    from pinet_fast.aggregation.strata_index import RowGroups

logger = logging.getLogger("pinet_fast.aggregation")

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative to the largest output: slices of a batch round differently in matrix products."""


@dataclass(frozen=True)
class SliceProof:
    """What the first use of a call site established.

    Attributes:
        dims: Row dimension of every tensor among the outputs, None where it has no rows.
        is_random: The function draws random numbers, so its forward could not be compared.
    """

    dims: tuple[int | None, ...]
    is_random: bool


def slice_rule(
    mode: Interception, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call ``func`` once for each stratum that is present.

    Raises:
        BoundaryError: ``func`` works in place, has rows in several layouts that do not go together,
            or computes across rows.
        RowLayoutError: The rows of its arguments or outputs are undecided.
    """
    name = getattr(func, "__name__", str(func))
    if name.endswith("_") and not name.endswith("__"):
        raise BoundaryError(
            f"{name}: works in place on rows or a parameter; use the form without underscore"
        )
    values, spec = pytree.tree_flatten((args, kwargs))
    roots = [mode.root_of(v) if isinstance(v, Tensor) else None for v in values]
    layouts = [
        _layout_of(mode, name, v, root, roots) for v, root in zip(values, roots, strict=True)
    ]
    used = [
        layout
        for layout, root in zip(layouts, roots, strict=True)
        if layout is not None and root is None
    ]
    if not used:
        return mode.derive(func, args, kwargs)
    groups = used[0].groups
    leaves = [
        None if root is None else mode.dense_leaf(root, name, used[0], is_sliced=True).unbind(0)  # type: ignore[union-attr]
        for root in roots
    ]

    def call(stratum: int) -> Any:
        parts = [
            _rows_of(value if leaf is None else leaf[stratum], layout, stratum)
            for value, layout, leaf in zip(values, layouts, leaves, strict=True)
        ]
        return func(*(unflat := pytree.tree_unflatten(parts, spec))[0], **unflat[1])

    present = [s for s, count in enumerate(groups.counts) if count]
    # Buffers that the function moves, as running statistics, go back if it is refused.
    constants = [
        (v, v.clone())
        for v, root, layout in zip(values, roots, layouts, strict=True)
        if isinstance(v, Tensor) and root is None and layout is None
    ]
    _check_layouts(name, [layout for layout in layouts if layout is not None])
    try:
        outputs = [call(s) for s in present]
    except _FAILURES as error:
        # A parameter repeated for every user, such as a learned first state, is cut with them.
        repeated = [
            mode.rows.find_exact(tuple(v.shape)) if root and not root.is_parameter else layout
            for v, root, layout in zip(values, roots, layouts, strict=True)
        ]
        if repeated == layouts:
            raise _unsliceable(mode, name, values, error) from error
        layouts = repeated
        try:
            outputs = [call(s) for s in present]
        except _FAILURES as again:
            raise _unsliceable(mode, name, values, again) from again
    flats = [pytree.tree_flatten(output) for output in outputs]
    site = (name, tuple(r.sources for r in roots if r is not None), len(flats[0][0]))
    whole = None
    if site not in mode.slice_proofs:
        whole = _whole_call(func, values, roots, spec)
        mode.slice_proofs[site] = _prove(name, [f[0] for f in flats], whole, groups, present)
        logger.info(
            "slice rule: %s has no boundary rule and runs once a stratum (exact, S launches)", name
        )
    proof = mode.slice_proofs[site]
    joined = [
        _joined(pieces, dim, groups)
        for pieces, dim in zip(zip(*(f[0] for f in flats), strict=True), proof.dims, strict=True)
    ]
    if whole is not None and not proof.is_random:
        try:
            _compare(name, joined, whole[0])
        except BoundaryError:
            del mode.slice_proofs[site]
            with torch.no_grad():
                for value, before in constants:
                    value.copy_(before)
            raise
    return pytree.tree_unflatten(joined, flats[0][1])


_FAILURES = (RuntimeError, IndexError, ValueError, TypeError)


def _unsliceable(
    mode: Interception, name: str, values: Sequence[Any], error: Exception
) -> BoundaryError:
    return BoundaryError(
        f"{name}: has no boundary rule, and fails on the rows of one stratum alone ({error}), so "
        "it computes across rows, as batch statistics do, or takes rows of another number than "
        f"the batch's ({mode.rows.describe()}); it was called with {mode.describe(values)}; use "
        "norms over features (LayerNorm, GroupNorm), keep one row a user or an event, mark work "
        "that belongs to no user by `with opt.shared():`, or use "
        'GradientAggregator(..., mode="exact")'
    )


def _layout_of(
    mode: Interception, name: str, value: Any, root: Root | None, roots: Sequence[Root | None]
) -> RowLayout | None:
    """Return the layout of rows, and of a parameter expanded over rows, such as a CLS token."""
    if not isinstance(value, Tensor) or (root is None and isinstance(value, nn.Parameter)):
        return None  # a frozen parameter may have any size
    if root is None:
        sizes = tuple(value.shape)
        if name.startswith("conv"):  # users first, by definition
            sizes = (sizes[0], *[-1] * (len(sizes) - 1))
        return mode.find(sizes, value, roots, name)
    if root.is_parameter:
        return None
    sizes = tuple(
        size if stride == 0 else -1
        for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    return mode.rows.find_exact(sizes)


def _check_layouts(name: str, used: Sequence[RowLayout]) -> None:
    sizes = {layout.groups.num_rows for layout in used}
    if len(sizes) > 1 or any(layout.outer != 1 for layout in used):
        kinds = ", ".join(
            f"{layout.kind} in dimension {layout.dim}"
            + (f" behind {layout.outer}" if layout.outer != 1 else "")
            for layout in used
        )
        raise BoundaryError(
            f"{name}: has no boundary rule, and its arguments hold rows in layouts that cannot be "
            f"cut by stratum together ({kinds}); bring them to one layout before the call"
        )


def _rows_of(value: Any, layout: RowLayout | None, stratum: int) -> Any:
    """Return the rows of one stratum along the layout's dimension; other values as they are."""
    if layout is None:
        return value
    groups = layout.groups
    first, end = (bound * layout.inner for bound in groups.offsets[stratum : stratum + 2])
    if groups.order is None:
        return value.narrow(layout.dim, first, end - first)
    order = groups.repeated(layout.inner).order
    assert order is not None
    return value.index_select(layout.dim, order[first:end])


@torch.no_grad()
def _whole_call(
    func: Callable[..., Any], values: list[Any], roots: list[Root | None], spec: Any
) -> tuple[list[Any], list[Any]]:
    """Call ``func`` twice on the whole batch; on copies, so that no buffer moves."""
    results = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            copies = [
                v.detach() if root is not None else v.clone() if isinstance(v, Tensor) else v
                for v, root in zip(values, roots, strict=True)
            ]
            args, kwargs = pytree.tree_unflatten(copies, spec)
            results.append(pytree.tree_flatten(func(*args, **kwargs))[0])
    return results[0], results[1]


def _prove(
    name: str,
    pieces: list[list[Any]],
    whole: tuple[list[Any], list[Any]],
    groups: RowGroups,
    present: list[int],
) -> SliceProof:
    is_random = any(
        isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(*whole, strict=True)
    )
    dims: list[int | None] = []
    for i, full in enumerate(whole[0]):
        if not isinstance(full, Tensor):
            dims.append(None)
            continue
        fitting = [
            dim
            for dim, size in enumerate(full.shape)
            if size % groups.num_rows == 0
            and all(
                part[i].shape[dim] * groups.num_rows == size * groups.counts[s]
                for part, s in zip(pieces, present, strict=True)
            )
        ]
        if len(fitting) > 1 and len(present) > 1:
            fitting = [d for d in fitting if pieces[0][i].shape[d] != full.shape[d]]
        if not fitting or (len(fitting) > 1 and len(present) > 1):
            raise RowLayoutError(
                f"{name}: cannot tell which dimension of its output {list(full.shape)} holds the "
                f"{groups.num_rows} rows; the function mixes or drops rows: keep the batch "
                'dimension, or use GradientAggregator(..., mode="exact")'
            )
        dims.append(fitting[0])
    return SliceProof(tuple(dims), is_random)


def _joined(pieces: tuple[Any, ...], dim: int | None, groups: RowGroups) -> Any:
    if dim is None or not isinstance(pieces[0], Tensor):
        return pieces[0]
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    if groups.order is None:
        return out
    order = groups.repeated(out.shape[dim] // groups.num_rows).order
    assert order is not None
    return out.index_select(dim, torch.argsort(order))


def _compare(name: str, joined: list[Any], whole: list[Any]) -> None:
    for mine, full in zip(joined, whole, strict=True):
        if not isinstance(full, Tensor) or not full.is_floating_point():
            continue
        scale = float(full.abs().max()) if full.numel() else 0.0
        error = float((mine.detach() - full).abs().max()) if full.numel() else 0.0
        if not error <= _TOLERANCE.get(full.dtype, 2e-2) * scale:
            raise BoundaryError(
                f"{name}: gives other values for a stratum alone than for the whole batch "
                f"(difference {error:.2g}), so it computes across rows, as batch statistics do; "
                "use a norm over features (LayerNorm, GroupNorm), or put the layer into "
                "evaluation mode"
            )
