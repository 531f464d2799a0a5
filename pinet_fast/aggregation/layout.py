"""Where the rows of the batch are in a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pinet_fast.aggregation.strata_index import RowGroups


class RowLayout(NamedTuple):
    """Where the rows of a tensor are.

    Attributes:
        dim: The dimension that holds rows.
        kind: ``events``, ``users`` or their multiple, as shown in messages.
        groups: The rows grouped by stratum.
        outer: Size of what was flattened into ``dim`` in front of the rows (time, when a
            [L, B, d] tensor became [L * B, d]).
        inner: Size of what was flattened into ``dim`` behind the rows ([B * L, d]).
    """

    dim: int
    kind: str
    groups: RowGroups
    outer: int = 1
    inner: int = 1
