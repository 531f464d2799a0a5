"""Virtual leaves: where the S stratum gradients of a parameter arrive in one backward.

A virtual leaf has shape [S, *shape] and stride 0 along S: it owns no memory. Boundary ops take it
beside the parameter and hand it the stratum gradients. Lookups have a leaf of their own each, with
a sparse gradient over (stratum, item), so that an item table never costs [S, V, d] unless it is
used densely too. A table with far fewer rows than a batch looks up, such as one of positions, costs
less in full, [S, V, d], than as a list of its rows.

Gradients that arrive at a derived tensor are pushed back to the parameters it is computed from,
once for each stratum: what lies between is batch-free, hence cheap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor


@dataclass(eq=False)
class Root:
    """A tensor computed from parameters alone: a parameter, a view of one, or derived ones.

    Attributes:
        tensor: The tensor as the model uses it.
        sources: Positions of the parameters it is computed from; one for a parameter or its view.
        is_parameter: It is a parameter of the optimizer itself.
        transposed_from: The 2-D parameter's root of which ``tensor`` is the plain transpose.
        has_rows: Computed inside ``shared()`` from rows too, which reach the parameters through
            boundaries of their own.
        foreign: Tensors it is computed from too that require gradients and are not ours.
        position: Counts roots in the order they were made; a root depends on earlier ones only.
    """

    tensor: Tensor
    sources: tuple[int, ...]
    is_parameter: bool = False
    transposed_from: Root | None = None
    has_rows: bool = False
    foreign: tuple[Tensor, ...] = ()
    position: int = 0
    _detached: Tensor | None = None

    def detached(self) -> Tensor:
        """Return the tensor without graph, as boundary ops take it.

        Made once a forward, and anew where ``p.data = ...`` has put other values in its place.
        """
        detached = self._detached
        if detached is None or detached.data_ptr() != self.tensor.data_ptr():
            detached = self._detached = self.tensor.detach()
        return detached


@dataclass
class Lookup:
    """One lookup's virtual leaf.

    Attributes:
        root: The table.
        leaf: The leaf; its gradient is sparse over (stratum, item).
        delivered: Where a compiled graph delivers that gradient instead, by ``number``: its leaf
            only says that there is one.
    """

    root: Root
    leaf: Tensor
    delivered: dict[int, Tensor] | None = None
    number: int = 0

    def gradient(self) -> Tensor | None:
        """Return the gradient over (stratum, item), or None."""
        if self.delivered is None or self.leaf.grad is None:
            return self.leaf.grad
        return self.delivered[self.number]


@dataclass
class Term:
    """A derived number added to the losses, such as an L2 penalty.

    Attributes:
        root: The derived tensor without rows.
        leaf: Receives its gradient: of the shape of ``root``, or [S] where it was added to rows.
        is_apart: It is batch-free: its gradient is added once, after the rule. Where False, the
            sum is a boundary like any other.
    """

    root: Root
    leaf: Tensor
    is_apart: bool

    def gradient(self) -> Tensor | None:
        """Return the gradient of the term, once and for all strata."""
        grad = self.leaf.grad
        if grad is None or grad.shape == self.root.tensor.shape:
            return grad
        return grad.amax(0)  # the strata that are present saw the same; absent ones saw none


@dataclass
class VirtualLeaves:
    """The virtual leaves of one stratified forward.

    Args:
        num_strata: S.
        on_gradient: Called with every gradient that reaches a leaf, where given.
        watches_all: Whether all leaves are watched so, or the first alone, which a backward of the
            losses reaches as a rule; a hook costs more than a leaf.
        keeps_touched: Whether the gradient of every lookup says which rows which stratum touched,
            as elementwise rules need; else those in small tables do not.

    Attributes:
        dense_leaves: Roots that are used densely and their leaves, by ``id(root)``. A lane puts in
            leaves that it keeps from one forward to the next; one that is used in Python too gets a
            hook, with which it serves no other forward.
        lookups: Every lookup.
        terms: Every derived number that was added to the losses.
        sparse_tables: By position, whether all lookups in a parameter are sparse ones.
    """

    num_strata: int
    on_gradient: Callable[[Tensor], None] | None = None
    watches_all: bool = True
    keeps_touched: bool = True
    dense_leaves: dict[int, tuple[Root, Tensor]] = field(default_factory=dict)
    lookups: list[Lookup] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    sparse_tables: dict[int, bool] = field(default_factory=dict)
    _is_watched: bool = False
    _shares_rows: bool = False
    _prepared: dict[int, Tensor] = field(default_factory=dict)
    _own: set[int] = field(default_factory=set)

    def prepare(self, roots: Iterable[Root]) -> None:
        """Make the leaves that the forward will ask for, as the last one did.

        In one loop it costs a third of what it costs between the calls of a model, which leave
        none of this code in the caches.
        """
        for root in roots:
            self._prepared[id(root)] = self._expanded(root)

    def dense(self, root: Root) -> Tensor:
        """Return the virtual tensor [S, *shape] that receives stratum gradients of ``root``."""
        if root.transposed_from is not None:
            return self.dense(root.transposed_from).transpose(1, 2)
        entry = self.dense_leaves.get(id(root))
        if entry is None:
            leaf = self._prepared.get(id(root))
            if leaf is None:
                leaf = self._new(root)
            elif self.watches_all or not self._is_watched:
                leaf = self._watched(leaf)
            entry = self.dense_leaves[id(root)] = (root, leaf)
            self._own.add(id(root))
            self._shares_rows |= root.has_rows
        elif id(root) not in self._own:  # a lane made the entry, and watches its own uses alone
            self._own.add(id(root))
            if self.on_gradient is not None:
                entry[1].register_hook(self.on_gradient)  # type: ignore[no-untyped-call]
        return entry[1]

    def lookup(self, root: Root) -> Tensor:
        """Return a virtual leaf for one lookup in ``root``; its gradient will be sparse."""
        leaf = self._new(root)
        self.lookups.append(Lookup(root, leaf))
        self._shares_rows |= root.has_rows
        return leaf

    def adopt_lookup(self, root: Root, leaf: Tensor) -> None:
        """Take in the leaf of a lookup with dense gradients, made elsewhere, in a parameter."""
        self.lookups.append(Lookup(root, leaf))
        self.sparse_tables[root.sources[0]] = False

    def delivered_lookup(self, root: Root, delivered: dict[int, Tensor], number: int) -> Tensor:
        """Return a leaf [1] for one lookup of a compiled graph, which delivers past the leaf."""
        leaf = self._watched(root.tensor.new_zeros(1).requires_grad_())
        self.lookups.append(Lookup(root, leaf, delivered, number))
        self._shares_rows |= root.has_rows
        return leaf

    def note_lookup(self, root: Root, is_sparse: bool) -> None:
        """Note whether a lookup asks for a sparse gradient; one that does not makes it dense."""
        for source in root.sources:
            self.sparse_tables[source] = is_sparse and self.sparse_tables.get(source, True)

    def term(self, root: Root) -> Term:
        """Return a leaf for a term that is added where no rows are left."""
        leaf = self._watched(root.tensor.detach().requires_grad_())
        self.terms.append(Term(root, leaf, is_apart=True))
        return self.terms[-1]

    def added_term(self, root: Root) -> Term:
        """Return a leaf [S] for a derived number that is added to rows."""
        self.terms.append(Term(root, self._new(root), is_apart=False))
        return self.terms[-1]

    def tensors(self) -> list[Tensor]:
        """Return all leaves."""
        leaves = [leaf for _, leaf in self.dense_leaves.values()]
        leaves += [entry.leaf for entry in self.lookups]
        return leaves + [term.leaf for term in self.terms]

    @property
    def share_rows(self) -> bool:
        """Return whether rows took part in shared work, whose graph is needed again."""
        return self._shares_rows

    def clear_gradients(self) -> None:
        """Drop what has arrived."""
        for leaf in self.tensors():
            leaf.grad = None

    def dense_parameters(self) -> list[int]:
        """Return the positions of the parameters that were used densely."""
        return [root.sources[0] for root, _ in self.dense_leaves.values() if root.is_parameter]

    def _new(self, root: Root) -> Tensor:
        return self._watched(self._expanded(root))

    def _expanded(self, root: Root) -> Tensor:
        tensor = root.detached()
        return tensor.expand(self.num_strata, *tensor.shape).requires_grad_()

    def _watched(self, leaf: Tensor) -> Tensor:
        if self.on_gradient is not None and (self.watches_all or not self._is_watched):
            self._is_watched = True
            leaf.register_hook(self.on_gradient)  # type: ignore[no-untyped-call]
        return leaf
