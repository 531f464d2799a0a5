"""One stratified forward and its backward: from losses to stratum gradients."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast.aggregation.interception import Interception
from pinet_fast.aggregation.leaves import StratumGradient, VirtualLeaves
from pinet_fast.aggregation.rows import BatchRows
from pinet_fast.aggregation.rules.base import BatchStrata
from pinet_fast.errors import AggregationError, RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pinet_fast.aggregation.leak_check import LeakCheck
    from pinet_fast.aggregation.slice_rule import SliceProof
    from pinet_fast.aggregation.strata_index import StrataIndex


@dataclass(frozen=True)
class StratumLosses:
    """Mean losses by stratum, with their graph.

    Attributes:
        values: ``sum_i w_i l_i / sum_i w_i`` over the rows of each stratum, [S]; 0 for absent ones.
        counts: Rows of every stratum.
        totals: Summed row weights of every stratum; equal to ``counts`` without weights.
        unit: What a row is, ``users`` or ``events``.
    """

    values: Tensor
    counts: tuple[int, ...]
    totals: tuple[float, ...]
    unit: str


def stratum_losses(losses: Tensor, weights: Tensor | None, rows: BatchRows) -> StratumLosses:
    """Reduce losses to one mean a stratum (DESIGN section 3).

    Args:
        losses: One loss a user [B], an event [T], or [B, L] beside ``weights``.
        weights: Row weights >= 0 of the shape of ``losses``, a mask for example.
        rows: The batch's row layouts.

    Raises:
        AggregationError: Losses without graph, or weights that are negative or of another shape.
        RowLayoutError: Losses whose rows are neither users nor events of the batch.
    """
    if not isinstance(losses, Tensor) or not losses.requires_grad:
        raise AggregationError(
            "backward: expected a tensor of losses with a graph; got "
            f"{type(losses).__name__} without one - was the model called under no_grad?"
        )
    layout = rows.find(tuple(losses.shape))
    if layout is None:
        raise RowLayoutError(
            f"backward: losses of shape {list(losses.shape)} are neither one a user nor one an "
            f"event of this batch ({rows.describe()}); use reduction='none' in the loss function, "
            "and pass lengths= to stratify for ragged batches"
        )
    groups = rows.groups_of(layout, tuple(losses.shape))
    flat = losses.flatten()
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    if weights is None:
        totals = torch.tensor(groups.counts, dtype=flat.dtype, device=flat.device)
        factors = totals.clamp_min(1).reciprocal()[groups.ids]
    else:
        if weights.shape != losses.shape or bool((weights < 0).any()):
            raise AggregationError(
                f"backward: weights must be >= 0 and of the shape of the losses "
                f"{list(losses.shape)}; got shape {list(weights.shape)}, minimum "
                f"{float(weights.min()) if weights.numel() else 'none'}"
            )
        flat_weights = weights.flatten().to(flat)
        totals = flat.new_zeros(groups.num_strata).index_add_(0, groups.ids, flat_weights)
        scale = torch.where(totals > 0, totals.clamp_min(torch.finfo(flat.dtype).tiny), 1.0)
        factors = flat_weights / scale[groups.ids]
    values = flat.new_zeros(groups.num_strata).index_add(0, groups.ids, flat * factors)
    return StratumLosses(
        values, groups.counts, tuple(totals.tolist()), layout.kind.split(" ", maxsplit=1)[0]
    )


class Session:
    """The state between entering ``stratify`` and the end of its backward.

    Args:
        parameters: Trainable parameters of the optimizer.
        names: Their names, for messages.
        strata: The batch's strata.
        check: The leak check.
        slice_proofs: What earlier steps established for functions under the slice rule.
        intercept: Whether boundaries are stratified; not for constant rules nor in exact mode.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        names: Sequence[str],
        strata: StrataIndex,
        *,
        check: LeakCheck,
        slice_proofs: dict[Any, SliceProof],
        intercept: bool,
    ) -> None:
        from pinet_fast.aggregation.boundary_rules import default_rules

        self.parameters = parameters
        self.names = names
        self.strata = strata
        self.rows = BatchRows(strata)
        self.check = check
        self.leaves = VirtualLeaves(strata.num_strata)
        self.interception: Interception | None = None
        if intercept:
            self.interception = Interception(
                parameters, names, rows=self.rows, leaves=self.leaves, check=check,
                rules=default_rules(), slice_proofs=slice_proofs,
            )  # fmt: skip

    def batch_strata(self, losses: StratumLosses, counts: Sequence[int] | None) -> BatchStrata:
        """Return what a constant rule may know about this batch."""
        given = None if counts is None else tuple(counts)
        return BatchStrata(
            losses.totals,
            user_counts=given or self.strata.user_counts,
            event_counts=given or self.strata.event_counts,
        )

    def stratum_gradients(self, losses: StratumLosses, step: int) -> list[StratumGradient | None]:
        """Run the backward and return the S gradients of every parameter (None = untouched).

        Raises:
            StratumLeakError: The check found a leak; no gradient was written.
            AggregationError: A parameter got gradient outside every boundary.
        """
        if self.interception is None:
            return self._by_separate_backwards(losses)
        present = [total > 0 for total in losses.totals]
        if self.interception.uses and sum(present) > 1:
            self.check.run(self.interception.uses, losses.values, present, step, self.names)
        with self._gradients_apart() as outside:
            torch.autograd.backward(losses.values, torch.ones_like(losses.values))
        touched = [name for grad, name in zip(outside, self.names, strict=True) if grad is not None]
        if touched:
            raise AggregationError(
                f"backward: {', '.join(touched)} got gradient outside every boundary, so its "
                "strata cannot be told apart; compute with the parameter inside "
                "`with opt.stratify(...)` and not in a custom autograd.Function or a ScriptModule, "
                'or use GradientAggregator(..., mode="exact")'
            )
        return self.leaves.collect(self.parameters)

    def _by_separate_backwards(self, losses: StratumLosses) -> list[StratumGradient | None]:
        """Run one backward a stratum over the joint graph: right for any loss, S times the cost."""
        parts: list[list[Tensor | None]] = []
        for stratum, loss in enumerate(losses.values):
            with self._gradients_apart() as gradients:
                if losses.totals[stratum] > 0:
                    torch.autograd.backward(loss, retain_graph=True)
            parts.append(list(gradients))
        collected: list[StratumGradient | None] = []
        for p, grads in zip(self.parameters, zip(*parts, strict=True), strict=True):
            known = [g.to_dense() if g is not None and g.is_sparse else g for g in grads]
            if all(g is None for g in known):
                collected.append(None)
                continue
            stacked = torch.stack([torch.zeros_like(p) if g is None else g for g in known])
            collected.append(StratumGradient(stacked))
        return collected

    @contextmanager
    def _gradients_apart(self) -> Iterator[list[Tensor | None]]:
        """Catch what reaches ``p.grad`` inside; the gradients from before are put back."""
        before = [p.grad for p in self.parameters]
        caught: list[Tensor | None] = []
        for p in self.parameters:
            p.grad = None
        try:
            yield caught
            caught.extend(p.grad for p in self.parameters)
        finally:
            for p, grad in zip(self.parameters, before, strict=True):
                p.grad = grad
