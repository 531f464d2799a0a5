"""Row layouts: which dimension of a tensor holds the rows of the batch, and their groups.

A dimension holds rows when its size is that of the batch: T events (where lengths are given), B
users, or, for the first dimension only, a multiple of T or B (a flattening such as [B * L, d]).
Where two dimensions qualify the layout is undecided and refused; what is decided here is then
proven by the leak check, which sees any wrong guess as gradient in another stratum's slice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pinet_fast.aggregation.strata_index import RowGroups, StrataIndex
from pinet_fast.errors import RowLayoutError


class RowLayout(NamedTuple):
    """Where the rows of a tensor are.

    Attributes:
        dim: The dimension that holds rows.
        kind: ``events``, ``users`` or their multiple, as shown in messages.
        groups: The rows along ``dim`` grouped by stratum.
    """

    dim: int
    kind: str
    groups: RowGroups


class BatchRows:
    """Finds row layouts for the tensors of one batch.

    Args:
        strata: The strata of the batch's users and, for ragged batches, events.
    """

    def __init__(self, strata: StrataIndex) -> None:
        self.strata = strata
        self._sizes: dict[int, tuple[str, RowGroups]] = {strata.num_users: ("users", strata.users)}
        if strata.events is not None and strata.num_events:
            self._sizes[strata.events.num_rows] = ("events", strata.events)
        self._flattened: dict[int, tuple[str, RowGroups] | None] = {}
        self._repeated: dict[tuple[int, int, int], RowGroups] = {}

    def find(self, shape: tuple[int, ...]) -> RowLayout | None:
        """Return the layout of a tensor whose candidate dimensions have the sizes ``shape``.

        Args:
            shape: Sizes of the dimensions that can hold rows (feature dimensions left out).

        Returns:
            The layout, or None where no dimension has a size of the batch.

        Raises:
            RowLayoutError: Two dimensions qualify.
        """
        matches = [dim for dim, size in enumerate(shape) if size in self._sizes]
        if len(matches) > 1:
            sizes = [shape[dim] for dim in matches]
            raise RowLayoutError(
                f"row layout: dimensions {matches} of {list(shape)} (sizes {sizes}) may both hold "
                f"the batch's rows ({self.describe()}), so the strata of its rows are undecided; "
                "pass a ragged batch with stratify(strata, lengths=...), or a batch whose size "
                "differs from the sequence length"
            )
        if matches:
            kind, groups = self._sizes[shape[matches[0]]]
            return RowLayout(matches[0], kind, groups)
        flattened = self._flattening(shape[0]) if shape and shape[0] > 0 else None
        return None if flattened is None else RowLayout(0, *flattened)

    def groups_of(self, layout: RowLayout, shape: tuple[int, ...]) -> RowGroups:
        """Return the groups of all ``prod(shape)`` rows of a tensor flattened to [N, ...].

        Args:
            layout: The layout found for ``shape``.
            shape: Sizes of all row-like dimensions, the row dimension among them.
        """
        inner = outer = 1
        for size in shape[layout.dim + 1 :]:
            inner *= size
        for size in shape[: layout.dim]:
            outer *= size
        # Keyed by the group's identity: this object keeps every group alive.
        key = (id(layout.groups), outer, inner)
        groups = self._repeated.get(key)
        if groups is None:
            groups = layout.groups.repeated(inner)
            if outer != 1:
                groups = RowGroups.from_ids(groups.ids.repeat(outer), groups.num_strata)
            self._repeated[key] = groups
        return groups

    def is_row_size(self, size: int) -> bool:
        """Return whether a dimension of this size may hold rows, alone or flattened."""
        return size in self._sizes or any(
            unit > 0 and size > 0 and size % unit == 0 for unit in self._sizes
        )

    def describe(self) -> str:
        """Return the sizes that identify rows, for messages."""
        return ", ".join(f"{kind}={size}" for size, (kind, _) in self._sizes.items())

    def _flattening(self, size: int) -> tuple[str, RowGroups] | None:
        if size not in self._flattened:
            self._flattened[size] = self._find_flattening(size)
        return self._flattened[size]

    def _find_flattening(self, size: int) -> tuple[str, RowGroups] | None:
        found = [
            (f"{kind} x {size // unit}", groups.repeated(size // unit))
            for unit, (kind, groups) in self._sizes.items()
            if unit and size and size % unit == 0
        ]
        if len(found) < 2:
            return found[0] if found else None
        if torch.equal(found[0][1].ids, found[1][1].ids):
            return found[0]
        raise RowLayoutError(
            f"row layout: {size} rows may be {found[0][0]} or {found[1][0]} "
            f"({self.describe()}); keep the batch dimension apart instead of flattening it"
        )


def row_tensor(rows: Tensor, feature_dims: int) -> Tensor:
    """Flatten all but the last ``feature_dims`` dimensions of ``rows`` to one: [N, *features]."""
    if rows.dim() == feature_dims + 1:
        return rows
    return rows.reshape(-1, *rows.shape[rows.dim() - feature_dims :])
