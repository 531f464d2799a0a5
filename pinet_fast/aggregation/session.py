"""One stratified forward and its backward: from losses to stratum gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast import profiling
from pinet_fast.aggregation.boundary_rules import default_rules
from pinet_fast.aggregation.collection import Collected, collect
from pinet_fast.aggregation.envelope import retained_buffers
from pinet_fast.aggregation.gradient_calls import refuse_backward, replay
from pinet_fast.aggregation.interception import Interception
from pinet_fast.aggregation.leaves import VirtualLeaves
from pinet_fast.aggregation.pending import gradients_apart, hold_nothing
from pinet_fast.aggregation.rows import BatchRows
from pinet_fast.aggregation.rules.base import BatchStrata
from pinet_fast.aggregation.stratum_gradient import StratumGradient, from_lookups
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pinet_fast.aggregation.leak_check import LeakCheck
    from pinet_fast.aggregation.leaves import Root
    from pinet_fast.aggregation.losses import LossRows, ScalarLoss
    from pinet_fast.aggregation.slice_proof import SliceProof
    from pinet_fast.aggregation.strata_index import StrataIndex
    from pinet_fast.aggregation.stratum_losses import StratumLosses
    from pinet_fast.aggregation.trace_plan import TracePlan


_RULES = default_rules()


def traceable() -> type[Interception]:
    """Return the interception that compilers may trace; imported where one is there."""
    from pinet_fast.aggregation.traced import TraceableInterception

    return TraceableInterception


class _BackwardGuard:
    """Refuses a backward that is not the aggregator's.

    Hung on every leaf, so it holds nothing: a leaf that held its session would keep gradients
    alive until the next garbage collection.
    """

    def __init__(self) -> None:
        self.is_expected = False

    def __call__(self, grad: Tensor) -> None:
        if not self.is_expected:
            refuse_backward()


class Session:
    """The state between entering ``stratify`` and the end of its backward.

    Args:
        parameters: Trainable parameters of the optimizer.
        names: Their names, for messages.
        strata: The batch's strata.
        check: The leak check.
        roots: The parameters' roots.
        slice_proofs: What earlier steps established for functions under the slice rule.
        intercept: Whether boundaries are stratified; not for constant rules nor in exact mode.
        declared: Row layouts that the user declares, by parameter name.
        on_scalar: Called at the end of a backward on a scalar; None where losses come as vectors.
        plan: What graphs may be compiled from; None where nothing is compiled in this process.
        lane: The class of interceptions in a lane, and the lane; None where there is none.

    Attributes:
        is_traced: Compiled models run as graphs that stratify; else they run eagerly.
        is_stratified: Stratum gradients are wanted, in one pass or in S.
        is_finished: A backward on the scalar was aggregated.
        scalar: How the loop reduces its losses; None where they come as vectors.
        attributes_leaks: Where users mix, gradients count for the stratum of their row.
        saw_leak: Users mix in this batch.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        names: Sequence[str],
        strata: StrataIndex,
        *,
        check: LeakCheck,
        roots: dict[int, Root],
        slice_proofs: dict[Any, SliceProof],
        intercept: bool,
        declared: Mapping[str, tuple[int, Tensor | Sequence[int]]] | None = None,
        on_scalar: Callable[[], None] | None = None,
        plan: TracePlan | None = None,
        lane: tuple[type[Interception], Any] | None = None,
    ) -> None:
        self.parameters = parameters
        self.names = names
        self.strata = strata
        self.rows = BatchRows(strata, declared)
        self.check = check
        self.scalar: ScalarLoss | None = None
        self.is_stratified = False
        self.attributes_leaks = False
        self.saw_leak = False
        self.leaves = VirtualLeaves(strata.num_strata)
        self.interception: Interception | None = None
        self.is_finished = False
        self.is_traced = False
        self.plan = plan
        self._guard = _BackwardGuard()
        if on_scalar is not None:
            self._watch(on_scalar)
        elif intercept:
            self.leaves.on_gradient, self.leaves.watches_all = self._guard, False
        if intercept:
            kind = Interception if plan is None else traceable()
            if lane is not None:
                kind = lane[0]
            self.interception = kind(
                parameters, names, rows=self.rows, leaves=self.leaves, check=check,
                rules=_RULES, slice_proofs=slice_proofs, own=roots,
                takes_scalars=on_scalar is not None,
            )  # fmt: skip
            if lane is not None:
                self.interception.lane = lane[1]  # type: ignore[attr-defined]
            if plan is not None:
                self.is_traced = self.interception.begin(plan)  # type: ignore[attr-defined]

    def batch_strata(
        self, rows: LossRows, counts: Sequence[int] | None, *, renormalise: bool
    ) -> BatchStrata:
        """Return what a constant rule may know about this batch."""
        given = None if counts is None else tuple(counts)
        return BatchStrata(
            rows.totals,
            user_counts=given or self.strata.user_counts,
            event_counts=given or self.strata.event_counts,
            renormalise=renormalise,
        )

    # Losses by stratum --------------------------------------------------------------------------

    def stratum_gradients(self, losses: StratumLosses, step: int) -> Collected:
        """Run the backward and return the S gradients of every parameter.

        Raises:
            StratumLeakError: The check found a leak; no gradient was written.
            AggregationError: A parameter got gradient outside every boundary.
        """
        if self.interception is None:
            return self._by_separate_backwards(losses)
        self._guard.is_expected = True
        self.interception.expect_backward(True)
        try:
            with gradients_apart(self.parameters), replay(self.interception):
                self._run_backward(losses, step)
                outside = [] if hold_nothing(self.parameters) else self._positions_with_gradient()
                collected = collect(self.leaves, self.parameters)
        finally:  # an error, too, leaves calls behind
            self.interception.expect_backward(False)
        self._refuse_outside(outside)
        return collected

    def _run_backward(self, losses: StratumLosses, step: int) -> None:
        assert self.interception is not None
        present = losses.rows.present
        if self.interception.uses and sum(present) > 1:
            retained = retained_buffers() if self.is_traced else nullcontext()
            with profiling.LEAK_CHECK, retained:
                self.saw_leak = self.check.run(
                    self.interception.uses, losses.values, present, step, self.names,
                    accept=self.attributes_leaks,
                )  # fmt: skip
        losses.backward(retain_graph=self.leaves.share_rows)

    def _positions_with_gradient(self) -> list[int]:
        return [i for i, p in enumerate(self.parameters) if p.grad is not None]

    def _refuse_outside(self, positions: Sequence[int]) -> None:
        touched = [self.names[i] for i in positions]
        if touched:
            if self.plan is not None:  # a graph may have done so: the next step is eager
                self.plan.refuse(f"{touched[0]} met rows where no boundary was")
            raise AggregationError(
                f"backward: {', '.join(touched)} got gradient outside every boundary, so its "
                "strata cannot be told apart; compute with the parameter inside "
                "`with opt.stratify(...)` and not in a custom autograd.Function, a ScriptModule, "
                "DataParallel or reentrant checkpointing (use_reentrant=False is fine), "
                'or use GradientAggregator(..., mode="exact")'
            )

    def _by_separate_backwards(self, losses: StratumLosses) -> Collected:
        """Run one backward a stratum over the joint graph: right for any loss, S times the cost."""
        parts: list[list[Tensor | None]] = []
        for total, loss in zip(losses.rows.totals, losses.values, strict=True):
            with gradients_apart(self.parameters):
                if total > 0:
                    torch.autograd.backward(loss, retain_graph=True)
                parts.append([p.grad for p in self.parameters])
        strata: list[StratumGradient | None] = []
        for p, grads in zip(self.parameters, zip(*parts, strict=True), strict=True):
            known = [g for g in grads if g is not None]
            if not known:
                strata.append(None)
            elif all(g.is_sparse for g in known):
                strata.append(_from_sparse(grads, p))
            else:
                full = [torch.zeros_like(p) if g is None else g for g in grads]
                stacked = torch.stack([g.to_dense() if g.is_sparse else g for g in full])
                strata.append(StratumGradient(stacked))
        return Collected(strata)

    # A scalar loss ------------------------------------------------------------------------------

    def _watch(self, on_scalar: Callable[[], None]) -> None:
        """Have ``on_scalar`` called at the end of a backward that reaches a virtual leaf."""
        is_queued = False

        def finish() -> None:
            nonlocal is_queued
            try:
                on_scalar()  # pushes shared work on rows back to leaves: not queued anew
            finally:
                is_queued = False

        def on_gradient(grad: Tensor) -> None:
            nonlocal is_queued
            if not is_queued:
                is_queued = True
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(finish)

        self.leaves.on_gradient = on_gradient
        self._grads_at_entry = [
            (p.grad, None if p.grad is None else p.grad._version) for p in self.parameters
        ]

    def scalar_gradients(self) -> Collected:
        """Return the stratum gradients that a backward on the scalar left.

        Raises:
            AggregationError: A parameter got gradient outside every boundary.
        """
        assert self.scalar is not None
        self._refuse_outside(
            [
                i
                for i, (grad, version) in enumerate(self._grads_at_entry)
                if self.parameters[i].grad is not grad
                or (grad is not None and grad._version != version)
            ]
        )
        try:
            with gradients_apart(self.parameters):
                collected = collect(self.leaves, self.parameters)
        except RuntimeError as error:
            if not self.leaves.share_rows:
                raise
            raise AggregationError(
                "backward: opt.shared() holds work on rows, whose graph is needed once more after "
                "this backward; call loss.backward(retain_graph=True), or opt.backward(losses)"
            ) from error
        self.leaves.clear_gradients()
        for gradient in collected.strata:
            if gradient is not None:
                factors = gradient.values.new_tensor(self.scalar.factors)
                shape = (-1, *[1] * (gradient.values.dim() - 1))
                gradient.values = gradient.values * factors.view(shape)
        return collected

    def note_gradients(self) -> None:
        """Note ``p.grad`` as it is now, for a second backward over the same forward."""
        self._grads_at_entry = [
            (p.grad, None if p.grad is None else p.grad._version) for p in self.parameters
        ]


def _from_sparse(grads: Sequence[Tensor | None], like: Tensor) -> StratumGradient:
    """Return the stratum gradients of sparse gradients, one a stratum; None = absent."""
    lookups = []
    for stratum, grad in enumerate(grads):
        if grad is not None:
            ids = grad._indices()[0]
            indices = torch.stack([torch.full_like(ids, stratum), ids])
            shape = (len(grads), *like.shape)
            lookups.append(
                torch.sparse_coo_tensor(indices, grad._values(), shape, check_invariants=False)
            )
    return from_lookups(lookups, None, is_sparse=True)
