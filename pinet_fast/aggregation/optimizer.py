"""GradientAggregator: an optimizer wrapper whose gradients are aggregated over strata."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from pinet_fast import profiling
from pinet_fast._allocator import keep_freed_memory
from pinet_fast.aggregation.combination import Absent, Combination
from pinet_fast.aggregation.gradient_calls import replay
from pinet_fast.aggregation.joined import joined
from pinet_fast.aggregation.losses import check_scalar, mark_terms, stratum_losses
from pinet_fast.aggregation.pending import PendingGradients
from pinet_fast.aggregation.report import AggregationReport
from pinet_fast.aggregation.rules import ConstantRule, ElementwiseRule, Rule, by_name
from pinet_fast.aggregation.stratifying import Leaks, Mode, StratifyingOptimizer
from pinet_fast.errors import AggregationError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.optim import Optimizer

    from pinet_fast.aggregation.leak_check import CheckMode
    from pinet_fast.aggregation.session import Session

_STATE_KEY = "pinet_fast"

_SAVED = ("rule", "counts", "absent", "report_every", "_num_steps")


class GradientAggregator(StratifyingOptimizer):
    """Wrap an optimizer so that each step follows gradients aggregated over strata of users.

    Example::

        opt = GradientAggregator(torch.optim.Adam(model.parameters()), rule="agreement")
        for batch in loader:
            opt.zero_grad()
            with opt.stratify(batch.strata):
                losses = model(batch)          # one loss per user [B] or per event [T]
            opt.backward(losses)
            opt.step()

    The wrapper is a real optimizer: ``param_groups``, ``state`` and ``defaults`` are those of the
    wrapped one, so schedulers, scalers and checkpoints work as before. It never sees the model.

    Several ``backward`` calls before a ``step`` add up their stratum gradients, and ``p.grad`` is
    combined anew from the sums. Where something else writes to ``p.grad`` in between, what is there
    stays as it is and the sums start anew. Hooks on parameters run on the combined gradient.

    Args:
        opt: The optimizer to wrap, or several that step together: ``[adam, sparse_adam]``.
        rule: A name of ``pinet_fast.rules.names()``, a rule object, or any function from the Gram
            [K, K] of the present strata to their weights [K]. Constant rules (joint, backdoor)
            cost one plain backward of
            reweighted losses; the others compute stratum gradients in one backward.
        num_strata: S. Fixed by the first StrataIndex or the first ids where not given.
        counts: Population counts of the strata for ``Backdoor(prior="users" | "events")`` where
            the strata come as raw ids.
        check: Leak check: ``"first"`` proves every boundary once, ``"always"``, ``"never"``.
        mode: ``"one-pass"``; or ``"exact"``, one backward a stratum over the joint graph, without
            interception: right also where a loss mixes users (in-batch negatives, batch
            statistics), at S times the backward's cost.
        absent: What constant rules make of strata that a batch lacks. ``"renormalise"``: the
            others share their weight, which tilts the estimate towards strata that are always
            there; ``"skip"``: it is lost, and the step is shorter. Rules that depend on gradients
            see the strata that are there, either way.
        leaks: What the leak check does where users mix. ``"error"``; or ``"attribute-by-row"``: a
            gradient counts for the stratum of the row it flows through, whoever's loss it comes
            from; the report says so.
        report_every: Compute stratum gradients, for the report's Gram, at every k-th step also for
            constant rules; None = never.

    Raises:
        ConfigError: An unknown rule or check, or something that is no optimizer.
    """

    def __init__(
        self,
        opt: Optimizer | Sequence[Optimizer],
        rule: str | Rule | Callable[[Tensor], Tensor] = "backdoor",
        *,
        num_strata: int | None = None,
        counts: Sequence[int] | None = None,
        check: CheckMode = "first",
        mode: Mode = "one-pass",
        absent: Absent = "renormalise",
        leaks: Leaks = "error",
        report_every: int | None = None,
    ) -> None:
        inner = joined(opt)
        if absent not in get_args(Absent):
            raise ConfigError(f'absent: expected "renormalise" or "skip", got {absent!r}')
        if leaks not in get_args(Leaks):
            raise ConfigError(f'leaks: expected "error" or "attribute-by-row", got {leaks!r}')
        if num_strata is not None and num_strata < 1:
            raise ConfigError(f"num_strata: expected a number >= 1, got {num_strata}")
        if mode not in get_args(Mode):
            raise ConfigError(f'mode: expected "one-pass" or "exact", got {mode!r}')
        if report_every is not None and report_every < 1:
            raise ConfigError(f"report_every: expected a number >= 1, got {report_every}")
        keep_freed_memory()
        rule = by_name(rule)
        super().__init__(inner, num_strata=num_strata, check=check, mode=mode, leaks=leaks)
        self.rule: Rule = rule
        self.counts = None if counts is None else tuple(counts)
        self.absent: Absent = absent
        self.report_every = report_every
        self._num_steps = 0
        self._begin()

    def _begin(self) -> None:
        self.report = AggregationReport(mode="plain")
        self._pending = PendingGradients()
        self._fresh = False
        self._warned_plain = False

    def _wants_stratum_gradients(self) -> bool:
        due = self.report_every is not None and self._num_steps % self.report_every == 0
        return due or not isinstance(self.rule.active, ConstantRule)

    def _needs_touched_rows(self) -> bool:
        return isinstance(self.rule.active, ElementwiseRule)

    # Backward and step --------------------------------------------------------------------------

    def backward(self, losses: Tensor, weights: Tensor | None = None) -> None:
        """Run one backward and leave the aggregated gradient in every ``p.grad``.

        Args:
            losses: One loss per user [B] or per event [T], or [B, L] with ``weights``; the
                reduction to stratum means is done here.
            weights: Row weights >= 0 of the shape of ``losses``, a mask for example.

        Raises:
            AggregationError: No ``stratify`` came before, or a parameter got gradient outside it.
            RowLayoutError: Losses of another size than the batch's users or events.
            StratumLeakError: The leak check failed.
        """
        session = self._session
        if session is None:
            raise AggregationError(
                "backward: no forward was stratified; compute the losses inside "
                "`with opt.stratify(batch.strata):`, once for every backward"
            )
        if session.scalar is not None:
            check_scalar(losses, weights)
            with torch._C.DisableTorchFunction(), replay(session.interception):
                torch.autograd.backward(losses)
            return
        self._session = None
        with torch._C.DisableTorchFunction():
            reduced = stratum_losses(losses, weights, session.rows)
            if not any(reduced.rows.present):
                raise AggregationError("backward: every stratum is empty (no loss rows)")
            if session.interception is not None or self._wants_stratum_gradients():
                if session.leaves.terms:
                    mark_terms(losses)
                means = reduced.reduce()
                with profiling.BACKWARD:
                    collected = session.stratum_gradients(reduced, self._num_steps)
                self.report = self._combination(session).run(collected, reduced.rows, means)
            else:
                self.report = self._combination(session).run_reweighted(reduced)
        self._fresh = True

    def _finish_scalar(self) -> None:
        """Aggregate at the end of a backward on a scalar; called by the engine."""
        session = self._session
        if session is None or session.scalar is None:
            raise AggregationError(
                "backward: this scalar belongs to a forward that a later stratify, step or "
                "zero_grad has ended; call backward before them"
            )
        with torch._C.DisableTorchFunction(), torch.no_grad():
            collected = session.scalar_gradients()
            self.report = self._combination(session).run(collected, session.scalar.rows, None)
            session.note_gradients()
        session.is_finished = True
        self._fresh = True

    def _combination(self, session: Session) -> Combination:
        return Combination(
            self.rule.active, session, self._pending, counts=self.counts, absent=self.absent
        )

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Run the wrapped optimizer's step on the aggregated gradients.

        Raises:
            ConfigError: A closure is given: it would recompute losses outside ``stratify``.
            AggregationError: A forward was stratified but ``backward`` was not called.
        """
        if closure is not None:
            raise ConfigError(
                "GradientAggregator.step takes no closure: stratify, backward and step are calls "
                "of their own; optimizers that need one (LBFGS) cannot be wrapped"
            )
        if self._session is not None and not self._session.is_finished:
            raise AggregationError(
                "step: the forward was stratified but opt.backward(losses) was not called; "
                "call it instead of loss.backward(), or say how the scalar was reduced by "
                'stratify(strata, reduction="mean")'
            )
        if not self._fresh:
            self._note_plain_step()
        with profiling.STEP:
            self.inner.step()
        if self._fresh:
            self.rule.commit()
        self._session = None
        self._fresh = False
        self._pending.clear()
        self._num_steps += 1

    def _note_plain_step(self) -> None:
        self.report = AggregationReport(mode="plain")
        if self._warned_plain:
            return
        # Zero gradients are how checkpoints make a fresh optimizer's state: nothing to warn of.
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if any(bool((grad != 0).any()) for grad in map(_dense, grads)):
            self._warned_plain = True
            warnings.warn(
                "GradientAggregator.step: these gradients come from no stratify(...), so this is "
                "a plain step (said once)",
                stacklevel=3,
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and what an unfinished stratified forward left."""
        if not self._inside:
            self._session = None
        self._fresh = False
        self._pending.clear()
        self.rule.discard()
        super().zero_grad(set_to_none)

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, and the aggregator's under one further key."""
        own = {
            "version": 1,
            "num_steps": self._num_steps,
            "num_strata": self.num_strata,
            "rule": self.rule.state_dict(),
        }
        return {**super().state_dict(), _STATE_KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of the bare wrapped optimizer."""
        own = state_dict.get(_STATE_KEY, {})
        super().load_state_dict({k: v for k, v in state_dict.items() if k != _STATE_KEY})
        self._num_steps = own.get("num_steps", 0)
        self.num_strata = own.get("num_strata", self.num_strata)
        if own:
            self.rule.load_state_dict(own["rule"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _SAVED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.update({name: state[name] for name in _SAVED})
        self._begin()

    def __repr__(self) -> str:
        return f"GradientAggregator(rule={self.rule!r}, inner={self.inner!r})"


def _dense(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad
