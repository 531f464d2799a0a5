"""From virtual leaves to stratum gradients: what one backward left, by parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pinet_fast.aggregation import compiled
from pinet_fast.aggregation.stratum_gradient import StratumGradient, from_lookups
from pinet_fast.kernels import stratified_embedding_add

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.aggregation.leaves import Root, VirtualLeaves

_SMALL_TABLE, _LOOKUPS_PER_ROW = 1024, 4  # as in csrc/nodes.cpp


@dataclass
class Collected:
    """What one backward left.

    Attributes:
        strata: The S stratum gradients, one entry a parameter; None = untouched.
        terms: The gradient of batch-free terms, by the position of the parameter.
    """

    strata: list[StratumGradient | None]
    terms: dict[int, Tensor] = field(default_factory=dict)


def collect(leaves: VirtualLeaves, parameters: Sequence[Tensor]) -> Collected:
    """Return the stratum gradients that the backward left.

    Args:
        leaves: The leaves of the forward.
        parameters: The parameters, in the order that ``Root.sources`` counts them.
    """
    return _Collection(leaves, parameters).run()


class _Collection:
    """One run of :func:`collect`."""

    def __init__(self, leaves: VirtualLeaves, parameters: Sequence[Tensor]) -> None:
        self.leaves = leaves
        self.parameters = parameters
        self.dense: list[Tensor | None] = [None] * len(parameters)
        self.lookups: list[list[Tensor]] = [[] for _ in parameters]
        self.derived: dict[int, tuple[Root, Tensor]] = {}

    def run(self) -> Collected:
        self._add_dense()
        for entry in self.leaves.lookups:
            of_lookup = entry.gradient()
            if of_lookup is not None:
                self._add(entry.root, of_lookup)
        for term in self.leaves.terms:
            if term.leaf.grad is not None and not term.is_apart:
                self._add(term.root, term.leaf.grad)
        # A root depends on earlier ones only, so the latest is complete.
        while self.derived:
            latest = max(self.derived, key=lambda key: self.derived[key][0].position)
            self._push(*self.derived.pop(latest))
        strata: list[StratumGradient | None] = []
        for i, (dense, lookups) in enumerate(zip(self.dense, self.lookups, strict=True)):
            if lookups:
                is_sparse = self.leaves.sparse_tables.get(i, False)
                strata.append(from_lookups(lookups, dense, is_sparse=is_sparse))
            else:
                strata.append(None if dense is None else StratumGradient(dense))
        return Collected(strata, self._terms())

    def _add_dense(self) -> None:
        """Add what arrived at dense leaves; the usual ones lose it."""
        functions, leaves = compiled.functions(), self.leaves.dense_leaves
        if functions is not None:
            taken = functions.take_gradients(leaves, len(self.parameters))
            if taken is not None:
                self.dense = taken
                return
        for root, leaf in leaves.values():
            grad = leaf.grad
            if grad is not None:
                self._add(root, grad)
                leaf.grad = None  # the next forward may have the leaf again

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
            and not self.leaves.sparse_tables.get(root.sources[0], False)
        )

    def _push(self, root: Root, grad: Tensor) -> None:
        """Push the gradient of a derived tensor back to what it is computed from."""
        targets = [self.parameters[i] for i in root.sources]
        uses: list[tuple[Root, Tensor]] = []
        if root.has_rows:
            uses = list(self.leaves.dense_leaves.values())
            uses += [(entry.root, entry.leaf) for entry in self.leaves.lookups]
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

    def _terms(self) -> dict[int, Tensor]:
        """Return the gradient of the batch-free terms, by the position of the parameter."""
        totals: dict[int, Tensor] = {}
        for term in self.leaves.terms:
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
                    totals[source] = totals[source] + dense if source in totals else dense
        return totals


def dense_lookup(grad: Tensor) -> Tensor:
    """Return the gradient of a lookup, sparse over (stratum, item), in full: [S, V, d]."""
    dense = grad._values().new_zeros(grad.shape)
    indices = grad._indices()
    stratified_embedding_add(dense, [indices[1]], [indices[0]], [grad._values()])
    return dense
