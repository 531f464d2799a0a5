"""What traced code reads of one step: parameters, their virtual leaves, and where rows are.

All methods are traced by Dynamo: plain loops, identities of tensors, sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pinet_fast.aggregation.traced_ops import KINDS, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pinet_fast.aggregation.traced import TraceableInterception

_VIEW = "a view of a parameter that was made outside the graph"


class Trace:
    """What traced code reads: parameters, leaves and roles of one step, and the batch's sizes.

    Args:
        mode: The interception of the step, whose plan is ready.
    """

    def __init__(self, mode: TraceableInterception) -> None:
        roots = [mode.by_id[id(p)] for p in mode.parameters]
        plan, leaves, strata = mode.plan, mode.leaves, mode.rows.strata
        self.parameters = list(mode.parameters)
        self.leaves = [
            leaves.dense(root) if i in plan.dense else None for i, root in enumerate(roots)
        ]
        for leaf in self.leaves:
            if leaf is not None:  # or its sizes are taken for the batch's where they are alike
                torch._dynamo.mark_static(leaf)
                if leaf._base is not None:
                    torch._dynamo.mark_static(leaf._base)
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
            parts = [self._slice_of(a, v, s) for a, v in zip(args, virtuals, strict=True)]
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
