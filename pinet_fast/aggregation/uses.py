"""Where parameters meet rows: the row layout, the virtual leaf, and the use to be proven."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pinet_fast.aggregation.gradient_calls import is_recording_hooks
from pinet_fast.aggregation.leak_check import LeakCheck, Site, Use
from pinet_fast.aggregation.roots import Roots
from pinet_fast.errors import RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.leaves import Root, Term, VirtualLeaves
    from pinet_fast.aggregation.rows import BatchRows


class BoundaryUses(Roots):
    """What boundary rules ask for: the layout of rows, and leaves for the roots they meet.

    Args:
        parameters: The optimizer's parameters that require gradients.
        names: Their names, for messages.
        rows: The batch's row layouts.
        leaves: Where stratum gradients will arrive.
        check: The leak check, asked which uses need proof.
        takes_scalars: Whether ``loss.backward()`` on a reduced loss is expected.
        own: The parameters' roots.

    Attributes:
        uses: Uses that this step's leak check will prove.
        saw_hooks: A boundary was computed while saved tensors went to hooks (checkpointing).
        is_replaying: The engine recomputes a part of the forward.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        *,
        rows: BatchRows,
        leaves: VirtualLeaves,
        check: LeakCheck,
        takes_scalars: bool,
        own: dict[int, Root],
    ) -> None:
        super().__init__(
            parameters, names, rows=rows, leaves=leaves, takes_scalars=takes_scalars, own=own
        )
        self.uses: list[Use] = []
        self.saw_hooks = False
        self.is_replaying = False
        self._check = check
        self._occurrences: dict[tuple[Any, ...], int] = {}
        self._known: dict[int, tuple[Tensor, RowLayout]] = {}

    def find(
        self,
        shape: tuple[int, ...],
        tensor: Tensor | None,
        roots: Sequence[Root | None],
        op: str,
    ) -> RowLayout | None:
        """Return the row layout of a call's operand: as declared for a parameter, or found.

        Where neither sizes nor the graph tell (L == B), what an earlier batch proved of the same
        parameter and op holds still.

        Args:
            shape: Sizes of the dimensions that can hold rows; -1 for dimensions that cannot.
            tensor: The operand; None where it has no graph worth asking.
            roots: The parameters it meets.
            op: The op, as the leak check names it.

        Raises:
            RowLayoutError: The layout is undecided, or another than declared.
        """
        if self.rows.declared:
            for root in roots:
                for source in () if root is None else root.sources:
                    layout = self.rows.find_declared(self.names[source], shape)
                    if layout is not None:
                        return layout
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        try:
            return self.rows.find(shape, tensor)
        except RowLayoutError:
            for sources in {root.sources for root in roots if root is not None}:
                role = self._check.proven_role(sources, op)
                layout = None if role is None else self.rows.with_role(*role, shape)
                if layout is not None:
                    return layout
            raise

    def dense_leaf(
        self, root: Root | None, op: str, layout: RowLayout, *, is_sliced: bool = False
    ) -> Tensor | None:
        """Return the virtual tensor that receives the dense stratum gradients of ``root``."""
        if root is None:
            return None
        if not self.saw_hooks:
            self.saw_hooks = is_recording_hooks()
        leaf = self.leaves.dense(root)
        site = self._unproven(root, op, layout, is_sliced)
        if site is not None:
            leaf = leaf.view_as(leaf)  # a node of this use's own, for its own proof
            self.uses.append(Use(site, leaf))
        return leaf

    def lookup_leaf(
        self, root: Root, op: str, layout: RowLayout, is_sparse: bool = False
    ) -> Tensor:
        """Return a virtual leaf that receives the sparse stratum gradients of one lookup."""
        if not self.saw_hooks:
            self.saw_hooks = is_recording_hooks()
        leaf = self.leaves.lookup(root)
        self.leaves.note_lookup(root, is_sparse)
        site = self._unproven(root, op, layout)
        if site is not None:
            self.uses.append(Use(site, leaf))
        return leaf

    def term_leaf(self, root: Root, op: str, layout: RowLayout) -> Term:
        """Return a leaf [S] for a derived number that is added to rows."""
        if not self.saw_hooks:
            self.saw_hooks = is_recording_hooks()
        term = self.leaves.added_term(root)
        site = self._unproven(root, op, layout)
        if site is not None:
            self.uses.append(Use(site, term.leaf))
        return term

    def _unproven(
        self, root: Root, op: str, layout: RowLayout, is_sliced: bool = False
    ) -> Site | None:
        """Count a use of ``root``; return its site where this step's leak check is to prove it."""
        key = (root.sources, op, layout.kind, layout.dim)
        occurrence = self._occurrences[key] = self._occurrences.get(key, -1) + 1
        place = (*key, occurrence, is_sliced)
        if place in self._check.settled or self.is_replaying:
            return None
        site = Site(*place)
        return site if self._check.wants(site, self.leaves.num_strata) else None
