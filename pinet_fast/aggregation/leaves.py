"""Virtual leaves: where the S stratum gradients of a parameter arrive in one backward.

A virtual leaf has shape [S, *shape] and stride 0 along S: it owns no memory. Boundary ops take it
beside the parameter and hand it the stratum gradients. Lookups have a leaf of their own each, with
a sparse gradient over (stratum, item), so that an item table never costs [S, V, d] unless it is
used densely too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Root:
    """A tensor computed from parameters alone: a parameter, a view of one, or derived ones.

    Attributes:
        tensor: The tensor as the model uses it.
        sources: Positions of the parameters it is computed from; one for a parameter or its view.
        transposed_from: The 2-D parameter's root of which ``tensor`` is the plain transpose.
    """

    tensor: Tensor
    sources: tuple[int, ...]
    is_parameter: bool = False
    transposed_from: Root | None = None


@dataclass
class StratumGradient:
    """The S stratum gradients of one parameter.

    Attributes:
        values: [S, *shape]; or [S, U, d] where only U rows of the parameter were touched.
        rows: The touched rows of the parameter, int64 [U], ascending; None = all.
        touched: Which strata touched which of these rows, bool [S, U]; None where ``rows`` is.
    """

    values: Tensor
    rows: Tensor | None = None
    touched: Tensor | None = None

    def combined(self, weights: Tensor, like: Tensor) -> Tensor:
        """Return ``sum_s weights[s] * values[s]`` in the shape of the parameter ``like``."""
        num_strata = self.values.shape[0]
        flat = self.values.reshape(num_strata, -1)
        mixed = torch.mv(flat.t(), weights.to(flat.dtype)).reshape(self.values.shape[1:])
        return self.spread(mixed, like)

    def spread(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Put a gradient of the touched rows, [U, d], into the shape of ``like``."""
        if self.rows is None:
            return gradient
        return torch.zeros_like(like).index_copy_(0, self.rows, gradient)

    def dense(self, like: Tensor) -> Tensor:
        """Return all S gradients in full, [S, *shape]; for tests and exact comparisons."""
        if self.rows is None:
            return self.values
        full = like.new_zeros((self.values.shape[0], *like.shape))
        return full.index_copy_(1, self.rows, self.values)


@dataclass
class VirtualLeaves:
    """The virtual leaves of one stratified forward.

    Args:
        num_strata: S.
    """

    num_strata: int
    _dense: dict[int, tuple[Root, Tensor]] = field(default_factory=dict)
    _lookups: list[tuple[Root, Tensor]] = field(default_factory=list)

    def dense(self, root: Root) -> Tensor:
        """Return the virtual tensor [S, *shape] that receives stratum gradients of ``root``."""
        if root.transposed_from is not None:
            return self.dense(root.transposed_from).transpose(1, 2)
        entry = self._dense.get(id(root))
        if entry is None:
            entry = self._dense[id(root)] = (root, self._new(root))
        return entry[1]

    def lookup(self, root: Root) -> Tensor:
        """Return a virtual leaf for one lookup in ``root``; its gradient will be sparse."""
        leaf = self._new(root)
        self._lookups.append((root, leaf))
        return leaf

    def _new(self, root: Root) -> Tensor:
        tensor = root.tensor.detach()
        return tensor.expand(self.num_strata, *tensor.shape).requires_grad_()

    def collect(self, parameters: list[Tensor]) -> list[StratumGradient | None]:
        """Return the stratum gradients that the backward left, one a parameter (None = untouched).

        Args:
            parameters: The parameters, in the order that ``Root.sources`` counts them.
        """
        dense: list[Tensor | None] = [None] * len(parameters)
        lookups: list[list[Tensor]] = [[] for _ in parameters]
        for root, leaf in self._dense.values():
            if leaf.grad is not None:
                _attribute(dense, root, leaf.grad, parameters)
        for root, leaf in self._lookups:
            if leaf.grad is None:
                continue
            if root.is_parameter:
                lookups[root.sources[0]].append(leaf.grad)
            else:
                _attribute(dense, root, leaf.grad.to_dense(), parameters)
        merged = zip(dense, lookups, strict=True)
        return [_merged(known, sparse) for known, sparse in merged]


def _attribute(
    dense: list[Tensor | None], root: Root, grad: Tensor, parameters: list[Tensor]
) -> None:
    """Add the gradient [S, *root.shape] to the parameters that ``root`` is computed from.

    What lies between a parameter and a derived tensor is batch-free, hence cheap: it is pushed
    back once per stratum.
    """
    if root.is_parameter:
        gradients: list[Tensor | None] = [grad]
    else:
        sources = [parameters[i] for i in root.sources]
        pushed = [
            torch.autograd.grad(root.tensor, sources, g, retain_graph=True, allow_unused=True)
            for g in grad
        ]
        gradients = [
            None if parts[0] is None else torch.stack(parts) for parts in zip(*pushed, strict=True)
        ]
    for source, gradient in zip(root.sources, gradients, strict=True):
        if gradient is not None:
            known = dense[source]
            dense[source] = gradient if known is None else known + gradient


def _merged(dense: Tensor | None, lookups: list[Tensor]) -> StratumGradient | None:
    """Merge the dense gradient and the lookups' sparse ones of one parameter."""
    if not lookups:
        return None if dense is None else StratumGradient(dense)
    indices = torch.cat([g._indices() for g in lookups], dim=1)
    values = torch.cat([g._values() for g in lookups])
    strata, ids = indices[0], indices[1]
    if dense is not None:
        num_strata, num_rows, *rest = dense.shape
        flat = dense.reshape(num_strata * num_rows, *rest)
        if flat.data_ptr() == dense.data_ptr():
            flat = flat.clone()  # a gradient may be shared with another holder
        flat.index_add_(0, strata * num_rows + ids, values)
        return StratumGradient(flat.view(num_strata, num_rows, *rest))
    num_strata, num_rows = lookups[0].shape[:2]
    rows, position = _touched(ids, num_rows)
    num_touched = rows.numel()
    place = strata * num_touched + position
    compact = values.new_zeros((num_strata * num_touched, values.shape[1]))
    compact.index_add_(0, place, values)
    touched = torch.zeros(num_strata * num_touched, dtype=torch.bool, device=ids.device)
    touched[place] = True
    return StratumGradient(
        compact.view(num_strata, num_touched, values.shape[1]),
        rows,
        touched.view(num_strata, num_touched),
    )


def _touched(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the distinct ids, ascending, and the position of every id among them.

    By marking rows instead of sorting ids: a pass over the table's length in bytes is cheaper.
    """
    mark = torch.zeros(num_rows, dtype=torch.bool, device=ids.device)
    mark[ids] = True
    rows = mark.nonzero().squeeze(1)
    place = torch.empty(num_rows, dtype=torch.int64, device=ids.device)
    place[rows] = torch.arange(rows.numel(), device=ids.device)
    return rows, place[ids]
