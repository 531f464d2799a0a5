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

import torch
from torch import Tensor

from pinet_fast.aggregation.stratum_gradient import StratumGradient, from_lookups
from pinet_fast.kernels import stratified_embedding_add

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


_SMALL_TABLE, _LOOKUPS_PER_ROW = 1024, 4  # as in csrc/nodes.cpp


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
class Collected:
    """What one backward left.

    Attributes:
        strata: The S stratum gradients, one entry a parameter; None = untouched.
        terms: The gradient of batch-free terms, one entry a parameter; None = in no term.
    """

    strata: list[StratumGradient | None]
    terms: list[Tensor | None]


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
    """

    num_strata: int
    on_gradient: Callable[[Tensor], None] | None = None
    watches_all: bool = True
    keeps_touched: bool = True
    _dense: dict[int, tuple[Root, Tensor]] = field(default_factory=dict)
    _lookups: list[Lookup] = field(default_factory=list)
    _terms: list[Term] = field(default_factory=list)
    _is_sparse: dict[int, bool] = field(default_factory=dict)
    _is_watched: bool = False
    _shares_rows: bool = False
    _prepared: dict[int, Tensor] = field(default_factory=dict)

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
        entry = self._dense.get(id(root))
        if entry is None:
            leaf = self._prepared.get(id(root))
            if leaf is None:
                leaf = self._new(root)
            elif self.watches_all or not self._is_watched:
                leaf = self._watched(leaf)
            entry = self._dense[id(root)] = (root, leaf)
            self._shares_rows |= root.has_rows
        elif not self._is_watched:  # a lane made the entry, and watches its own uses alone
            self._watched(entry[1])
        return entry[1]

    def lookup(self, root: Root) -> Tensor:
        """Return a virtual leaf for one lookup in ``root``; its gradient will be sparse."""
        leaf = self._new(root)
        self._lookups.append(Lookup(root, leaf))
        self._shares_rows |= root.has_rows
        return leaf

    def adopt_lookup(self, root: Root, leaf: Tensor) -> None:
        """Take in the leaf of a lookup with dense gradients, made elsewhere, in a parameter."""
        self._lookups.append(Lookup(root, leaf))
        self._is_sparse[root.sources[0]] = False

    def lent(self) -> tuple[dict[int, tuple[Root, Tensor]], dict[int, Tensor]]:
        """Return the dense leaves by ``id(root)``, used ones and prepared ones, to be filled."""
        return self._dense, self._prepared

    def delivered_lookup(self, root: Root, delivered: dict[int, Tensor], number: int) -> Tensor:
        """Return a leaf [1] for one lookup of a compiled graph, which delivers past the leaf."""
        leaf = self._watched(root.tensor.new_zeros(1).requires_grad_())
        self._lookups.append(Lookup(root, leaf, delivered, number))
        self._shares_rows |= root.has_rows
        return leaf

    def note_lookup(self, root: Root, is_sparse: bool) -> None:
        """Note whether a lookup asks for a sparse gradient; one that does not makes it dense."""
        for source in root.sources:
            self._is_sparse[source] = is_sparse and self._is_sparse.get(source, True)

    def term(self, root: Root) -> Term:
        """Return a leaf for a term that is added where no rows are left."""
        leaf = self._watched(root.tensor.detach().requires_grad_())
        self._terms.append(Term(root, leaf, is_apart=True))
        return self._terms[-1]

    def added_term(self, root: Root) -> Term:
        """Return a leaf [S] for a derived number that is added to rows."""
        self._terms.append(Term(root, self._new(root), is_apart=False))
        return self._terms[-1]

    def tensors(self) -> list[Tensor]:
        """Return all leaves."""
        leaves = [leaf for _, leaf in self._dense.values()]
        leaves += [entry.leaf for entry in self._lookups]
        return leaves + [term.leaf for term in self._terms]

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
        return [root.sources[0] for root, _ in self._dense.values() if root.is_parameter]

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

    def collect(self, parameters: Sequence[Tensor]) -> Collected:
        """Return the stratum gradients that the backward left.

        Args:
            parameters: The parameters, in the order that ``Root.sources`` counts them.
        """
        return _Collection(self, parameters).run()


class _Collection:
    """One run of :meth:`VirtualLeaves.collect`."""

    def __init__(self, leaves: VirtualLeaves, parameters: Sequence[Tensor]) -> None:
        self.leaves = leaves
        self.parameters = parameters
        self.dense: list[Tensor | None] = [None] * len(parameters)
        self.lookups: list[list[Tensor]] = [[] for _ in parameters]
        self.derived: dict[int, tuple[Root, Tensor]] = {}

    def run(self) -> Collected:
        for root, leaf in self.leaves._dense.values():
            grad = leaf.grad
            if grad is None:
                continue
            source = root.sources[0]
            if root.is_parameter and self.dense[source] is None and not grad.is_sparse:
                self.dense[source] = grad  # as nearly all do: no call for it
            else:
                self._add(root, grad)
        for entry in self.leaves._lookups:
            of_lookup = entry.gradient()
            if of_lookup is not None:
                self._add(entry.root, of_lookup)
        for term in self.leaves._terms:
            if term.leaf.grad is not None and not term.is_apart:
                self._add(term.root, term.leaf.grad)
        # A root depends on earlier ones only, so the latest is complete.
        while self.derived:
            latest = max(self.derived, key=lambda key: self.derived[key][0].position)
            self._push(*self.derived.pop(latest))
        strata: list[StratumGradient | None] = []
        for i, (dense, lookups) in enumerate(zip(self.dense, self.lookups, strict=True)):
            if lookups:
                is_sparse = self.leaves._is_sparse.get(i, False)
                strata.append(from_lookups(lookups, dense, is_sparse=is_sparse))
            else:
                strata.append(None if dense is None else StratumGradient(dense))
        return Collected(strata, self._terms())

    def _add(self, root: Root, grad: Tensor) -> None:
        """Add the gradient [S, *root.shape], dense or over (stratum, item)."""
        if root.is_parameter and grad.is_sparse:
            if not self._is_of_small_table(root, grad):
                self.lookups[root.sources[0]].append(grad)
                return
            grad = dense_lookup(grad)
        elif grad.is_sparse:
            grad = grad.to_dense()
        if root.is_parameter:
            source = root.sources[0]
            known = self.dense[source]
            self.dense[source] = grad if known is None else known + grad
        else:
            entry = self.derived.get(id(root))
            self.derived[id(root)] = (root, grad if entry is None else entry[1] + grad)

    def _is_of_small_table(self, root: Root, grad: Tensor) -> bool:
        num_rows = root.tensor.shape[0]
        return (
            not self.leaves.keeps_touched
            and num_rows <= _SMALL_TABLE
            and grad.sparse_dim() + grad.dense_dim() == 3
            and num_rows * _LOOKUPS_PER_ROW <= grad._nnz()
            and not self.leaves._is_sparse.get(root.sources[0], False)
        )

    def _push(self, root: Root, grad: Tensor) -> None:
        """Push the gradient of a derived tensor back to what it is computed from."""
        targets = [self.parameters[i] for i in root.sources]
        uses: list[tuple[Root, Tensor]] = []
        if root.has_rows:
            uses = list(self.leaves._dense.values())
            uses += [(entry.root, entry.leaf) for entry in self.leaves._lookups]
            targets += [leaf for _, leaf in uses]
        pushed = [
            torch.autograd.grad(root.tensor, targets, g, retain_graph=True, allow_unused=True)
            for g in grad
        ]
        parts = list(zip(*pushed, strict=True))
        for source, part in zip(root.sources, parts, strict=False):
            if part[0] is None:
                continue
            stacked = torch.stack(part)
            if stacked.is_sparse:
                self.lookups[source].append(stacked.coalesce())
            else:
                known = self.dense[source]
                self.dense[source] = stacked if known is None else known + stacked
        for (used, _), part in zip(uses, parts[len(root.sources) :], strict=True):
            if part[0] is not None:
                # The rows behind a shared tensor belong to no user: which stratum they are of
                # does not matter, whose loss used them does.
                whole = [torch.sparse.sum(g, 0) if g.is_sparse else g.sum(0) for g in part]
                stacked = torch.stack(whole)
                self._add(used, stacked.coalesce() if stacked.is_sparse else stacked)
        if root.foreign:
            foreign = list(root.foreign)
            grads = torch.autograd.grad(
                root.tensor, foreign, grad.sum(0), retain_graph=True, allow_unused=True
            )
            for tensor, ordinary in zip(foreign, grads, strict=True):
                if ordinary is not None:
                    torch.autograd.backward(tensor, ordinary, retain_graph=True)

    def _terms(self) -> list[Tensor | None]:
        """Return the gradient of the batch-free terms, one a parameter."""
        totals: list[Tensor | None] = [None] * len(self.parameters)
        for term in self.leaves._terms:
            grad = term.gradient() if term.is_apart else None
            if grad is None:
                continue
            sources = [self.parameters[i] for i in term.root.sources]
            parts = torch.autograd.grad(
                term.root.tensor, sources, grad, retain_graph=True, allow_unused=True
            )
            for source, pushed in zip(term.root.sources, parts, strict=True):
                if pushed is not None:
                    dense = pushed.to_dense() if pushed.is_sparse else pushed
                    known = totals[source]
                    totals[source] = dense if known is None else known + dense
        return totals


def dense_lookup(grad: Tensor) -> Tensor:
    """Return the gradient of a lookup, sparse over (stratum, item), in full: [S, V, d]."""
    dense = grad._values().new_zeros(grad.shape)
    indices = grad._indices()
    stratified_embedding_add(dense, [indices[1]], [indices[0]], [grad._values()])
    return dense
