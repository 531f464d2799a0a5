"""Row layouts: which dimension of a tensor holds the rows of the batch, and their groups.

A dimension holds rows when its size is that of the batch: T events (where lengths are given) or B
users. Where two dimensions qualify, or a dimension is a multiple of these (a flattening such as
[B * L, d] or [L * B, d]), the tensor's graph is asked; where that does not tell, two candidates are
refused and a flattening is taken as B-major. What is decided here is then proven by the leak check,
which sees any wrong guess as gradient in another stratum's slice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pinet_fast.aggregation.layout import RowLayout
from pinet_fast.aggregation.provenance import LayoutOf, Traced, trace
from pinet_fast.aggregation.strata_index import RowGroups, StrataIndex
from pinet_fast.errors import RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class BatchRows:
    """Finds row layouts for the tensors of one batch.

    Args:
        strata: The strata of the batch's users and, for ragged batches, events.
        declared: Layouts that the user declares: by parameter name, the dimension that holds rows
            in what the parameter meets, and the stratum of every position along it.

    Raises:
        StrataError: Declared ids out of range.

    Attributes:
        delivered: Gradients of lookups in compiled graphs, sparse over (stratum, item), by the
            number of the lookup.
        layout_of: Tells the layouts that compiled boundaries noted; None where there is no lane.
    """

    def __init__(
        self,
        strata: StrataIndex,
        declared: Mapping[str, tuple[int, Tensor | Sequence[int]]] | None = None,
    ) -> None:
        self.strata = strata
        self.declared = {
            name: (dim, StrataIndex(ids, strata.num_strata).to(strata.ids.device).users)
            for name, (dim, ids) in (declared or {}).items()
        }
        self._sizes: dict[int, tuple[str, RowGroups]] = {strata.num_users: ("users", strata.users)}
        if strata.events is not None and strata.num_events:
            self._sizes[strata.events.num_rows] = ("events", strata.events)
        self.delivered: dict[int, Tensor] = {}
        self._is_row_size: dict[int, bool] = {}
        self._exact: dict[tuple[int, ...], RowLayout | None] = {}
        self._repeated: dict[tuple[int, int, int], RowGroups] = {}
        self._traced: Traced = {}
        self.layout_of: LayoutOf | None = None

    def find(self, shape: tuple[int, ...], tensor: Tensor | None = None) -> RowLayout | None:
        """Return the layout of a tensor whose candidate dimensions have the sizes ``shape``.

        The tensor's autograd graph is asked where its rows came from. Where it does not tell, one
        dimension of the batch's size decides; a multiple of that size is taken as B-major.

        Args:
            shape: Sizes of the dimensions that can hold rows; -1 for dimensions that cannot.
            tensor: The tensor; None where it has no graph worth asking.

        Returns:
            The layout, or None where no dimension has a size of the batch.

        Raises:
            RowLayoutError: Two dimensions qualify and the graph does not tell.
        """
        # The graph first: rows that were chosen from the batch may have its size by chance.
        traced = None
        if tensor is not None and tensor.grad_fn is not None:
            traced = self.trace(tensor)
        if traced is not None and traced.dim < len(shape) and shape[traced.dim] >= 0:
            return traced
        exact = self.find_exact(shape)
        if exact is not None:
            return exact
        matches = [dim for dim, size in enumerate(shape) if size in self._sizes]
        if matches:
            sizes = [shape[dim] for dim in matches]
            raise RowLayoutError(
                f"row layout: dimensions {matches} of {list(shape)} (sizes {sizes}) may both hold "
                f"the batch's rows ({self.describe()}), so the strata of its rows are undecided; "
                "pass a ragged batch with stratify(strata, lengths=...), declare the layout with "
                "stratify(strata, rows={parameter name: (dim, stratum ids along it)}), or train on "
                "a batch whose size differs from the sequence length first"
            )
        return self._flattening(shape[0]) if shape and shape[0] > 0 else None

    def trace(self, tensor: Tensor) -> RowLayout | None:
        """Return the layout of a tensor as its graph tells, or None where it does not."""
        return trace(tensor, self._traced, self.layout_of)

    def whole_layouts(self) -> list[tuple[str, RowLayout]]:
        """Return the kinds of the batch's rows, and the layout of a tensor [N] of each."""
        return [(kind, RowLayout(0, kind, groups)) for kind, groups in self._sizes.values()]

    def find_exact(self, shape: tuple[int, ...]) -> RowLayout | None:
        """Return the layout where exactly one dimension has the batch's size, else None."""
        if shape not in self._exact:
            matches = [dim for dim, size in enumerate(shape) if size in self._sizes]
            layout = None
            if len(matches) == 1:
                layout = RowLayout(matches[0], *self._sizes[shape[matches[0]]])
            self._exact[shape] = layout
        return self._exact[shape]

    def with_role(self, kind: str, dim: int, shape: tuple[int, ...]) -> RowLayout | None:
        """Return the layout of rows of a kind in a dimension, where ``shape`` allows it."""
        for size, (name, groups) in self._sizes.items():
            if name == kind and dim < len(shape) and shape[dim] == size:
                return RowLayout(dim, kind, groups)
        return None

    def find_declared(self, name: str, shape: tuple[int, ...]) -> RowLayout | None:
        """Return the layout declared for the parameter ``name``, or None.

        Raises:
            RowLayoutError: The declared dimension has another size.
        """
        if name not in self.declared:
            return None
        dim, groups = self.declared[name]
        place = dim % len(shape) if shape else 0
        if not shape or not -len(shape) <= dim < len(shape) or shape[place] != groups.num_rows:
            raise RowLayoutError(
                f"row layout: rows= declares {groups.num_rows} rows in dimension {dim} of what "
                f"{name} meets, whose dimensions that can hold rows are {list(shape)}; declare "
                "the dimension and one stratum id for each position along it"
            )
        return RowLayout(place, "declared", groups)

    def groups_of(self, layout: RowLayout, shape: tuple[int, ...]) -> RowGroups:
        """Return the groups of all ``prod(shape)`` rows of a tensor flattened to [N, ...].

        Args:
            layout: The layout found for ``shape``.
            shape: Sizes of all row-like dimensions, the row dimension among them.
        """
        if len(shape) == 1:
            if layout.inner == 1 and layout.outer == 1:
                return layout.groups
            return self._expanded(layout.groups, layout.outer, layout.inner)
        inner = layout.inner * math.prod(shape[layout.dim + 1 :])
        outer = layout.outer * math.prod(shape[: layout.dim])
        return self._expanded(layout.groups, outer, inner)

    def groups_along(self, layout: RowLayout) -> RowGroups:
        """Return the groups of the positions along the layout's dimension alone."""
        return self._expanded(layout.groups, layout.outer, layout.inner)

    def groups_of_kind(self, kind: str, outer: int, inner: int) -> RowGroups:
        """Return the groups of the batch's users or events, flattened with other dimensions."""
        base = self.strata.events if kind == "events" else self.strata.users
        return self._expanded(base or self.strata.users, outer, inner)

    def _expanded(self, base: RowGroups, outer: int, inner: int) -> RowGroups:
        if inner == 1 and outer == 1:
            return base
        # Keyed by the group's identity: this object keeps every group alive.
        key = (id(base), outer, inner)
        groups = self._repeated.get(key)
        if groups is None:
            groups = base.repeated(inner)
            if outer != 1:
                groups = RowGroups.from_ids(groups.ids.repeat(outer), groups.num_strata)
            self._repeated[key] = groups
        return groups

    def is_row_size(self, size: int) -> bool:
        """Return whether a dimension of this size may hold rows, alone or flattened."""
        known = self._is_row_size.get(size)
        if known is None:
            known = self._is_row_size[size] = size in self._sizes or any(
                unit > 0 and size > 0 and size % unit == 0 for unit in self._sizes
            )
        return known

    def describe(self) -> str:
        """Return the sizes that identify rows, for messages."""
        return ", ".join(f"{kind}={size}" for size, (kind, _) in self._sizes.items())

    def _flattening(self, size: int) -> RowLayout | None:
        found = [
            RowLayout(0, kind, groups, inner=size // unit)
            for unit, (kind, groups) in self._sizes.items()
            if unit and size % unit == 0
        ]
        if len(found) < 2:
            return found[0] if found else None
        if torch.equal(*(self.groups_along(layout).ids for layout in found)):
            return found[0]
        names = " or ".join(f"{layout.inner} for each of the {layout.kind}" for layout in found)
        raise RowLayoutError(
            f"row layout: {size} rows may be {names} ({self.describe()}); keep the batch "
            "dimension apart instead of flattening it"
        )


def row_tensor(rows: Tensor, feature_dims: int) -> Tensor:
    """Flatten all but the last ``feature_dims`` dimensions of ``rows`` to one: [N, *features]."""
    if rows.dim() == feature_dims + 1:
        return rows
    return rows.reshape(-1, *rows.shape[rows.dim() - feature_dims :])
