"""The slice rule: stratum gradients of any row-independent function, by calling it once a stratum.

A function without a boundary rule is called on the rows of each stratum with that stratum's slice
of the virtual leaves, and the outputs are put together again: one pass in FLOPs, S launches. That
is right only if rows do not influence each other, which slice_proof.py sees to.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pinet_fast.aggregation.slice_proof import compare, prove, whole_call
from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pinet_fast.aggregation.interception import Interception
    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.leaves import Root
    from pinet_fast.aggregation.strata_index import RowGroups

logger = logging.getLogger("pinet_fast.aggregation")


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
    call = _SlicedCall(mode, func, name, args, kwargs)
    if call.groups is None:
        return mode.derive(func, args, kwargs)
    return call.join(call.by_stratum())


class _SlicedCall:
    """One call of a function under the rule.

    Attributes:
        groups: The rows of its arguments by stratum; None where none holds rows.
    """

    def __init__(
        self,
        mode: Interception,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._mode, self._func, self._name = mode, func, name
        self._values, self._spec = pytree.tree_flatten((args, kwargs))
        self._roots = roots = [
            mode.root_of(value) if isinstance(value, Tensor) else None for value in self._values
        ]
        self._layouts = [
            _layout_of(mode, name, value, root, roots)
            for value, root in zip(self._values, roots, strict=True)
        ]
        of_rows = [
            layout
            for layout, root in zip(self._layouts, roots, strict=True)
            if layout is not None and root is None
        ]
        self.groups: RowGroups | None = None
        if of_rows:
            self.groups = of_rows[0].groups
            self._leaves = [
                None if root is None
                else mode.dense_leaf(root, name, of_rows[0], is_sliced=True).unbind(0)  # type: ignore[union-attr]
                for root in roots
            ]  # fmt: skip
            # Buffers that the function moves, as running statistics, go back if it is refused.
            self._constants = [
                (value, value.clone())
                for value, root, layout in zip(self._values, roots, self._layouts, strict=True)
                if isinstance(value, Tensor) and root is None and layout is None
            ]

    def by_stratum(self) -> list[Any]:
        """Return the outputs of the strata that are present.

        Raises:
            BoundaryError: The function fails on the rows of one stratum alone.
        """
        _check_layouts(self._name, [layout for layout in self._layouts if layout is not None])
        try:
            return self._outputs(self._layouts)
        except _FAILURES as error:
            # A parameter repeated for every user, such as a learned first state, is cut with them.
            repeated = [
                self._mode.rows.find_exact(tuple(value.shape))
                if root and not root.is_parameter else layout
                for value, root, layout in zip(
                    self._values, self._roots, self._layouts, strict=True
                )
            ]  # fmt: skip
            if repeated == self._layouts:
                raise _unsliceable(self._mode, self._name, self._values, error) from error
            try:
                return self._outputs(repeated)
            except _FAILURES as again:
                raise _unsliceable(self._mode, self._name, self._values, again) from again

    def join(self, outputs: list[Any]) -> Any:
        """Return the output for the whole batch; the first of a call site is compared with it.

        Raises:
            BoundaryError: The function computes across rows.
            RowLayoutError: It is undecided where its outputs hold the rows.
        """
        assert self.groups is not None
        flats = [pytree.tree_flatten(output) for output in outputs]
        pieces, proofs = [flat[0] for flat in flats], self._mode.slice_proofs
        of_roots = tuple(root.sources for root in self._roots if root is not None)
        site = (self._name, of_roots, len(pieces[0]))
        whole = None
        if site not in proofs:
            whole = whole_call(self._func, self._values, self._roots, self._spec)
            proofs[site] = prove(self._name, pieces, whole, self.groups)
            logger.info(
                "slice rule: %s has no boundary rule and runs once a stratum (exact, S launches)",
                self._name,
            )
        proof = proofs[site]
        joined = [
            _joined(of_strata, dim, self.groups)
            for of_strata, dim in zip(zip(*pieces, strict=True), proof.dims, strict=True)
        ]
        if whole is not None and not proof.is_random:
            try:
                compare(self._name, joined, whole[0])
            except BoundaryError:
                del proofs[site]
                with torch.no_grad():
                    for value, before in self._constants:
                        value.copy_(before)
                raise
        return pytree.tree_unflatten(joined, flats[0][1])

    def _outputs(self, layouts: Sequence[RowLayout | None]) -> list[Any]:
        assert self.groups is not None
        present = [stratum for stratum, count in enumerate(self.groups.counts) if count]
        return [self._output(stratum, layouts) for stratum in present]

    def _output(self, stratum: int, layouts: Sequence[RowLayout | None]) -> Any:
        parts = [
            _rows_of(value if leaf is None else leaf[stratum], layout, stratum)
            for value, layout, leaf in zip(self._values, layouts, self._leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(parts, self._spec)
        return self._func(*args, **kwargs)


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


def _joined(pieces: tuple[Any, ...], dim: int | None, groups: RowGroups) -> Any:
    if dim is None or not isinstance(pieces[0], Tensor):
        return pieces[0]
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    if groups.order is None:
        return out
    order = groups.repeated(out.shape[dim] // groups.num_rows).order
    assert order is not None
    return out.index_select(dim, torch.argsort(order))
