"""GradientAggregator: an optimizer wrapper whose gradients are aggregated over strata."""

from __future__ import annotations

import operator
import warnings
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from pinet_fast import profiling
from pinet_fast._allocator import keep_freed_memory
from pinet_fast.aggregation.combination import Absent, Combination, reported_losses
from pinet_fast.aggregation.compiler_names import can_trace
from pinet_fast.aggregation.envelope import (
    compiled_modules,
    is_compiler_used,
    refuse_outside_envelope,
)
from pinet_fast.aggregation.gradient_calls import replay
from pinet_fast.aggregation.joined import JoinedOptimizers, joined
from pinet_fast.aggregation.leak_check import CheckMode, LeakCheck
from pinet_fast.aggregation.losses import (
    Reduction,
    ScalarLoss,
    StratumLosses,
    mark_terms,
    stratum_losses,
)
from pinet_fast.aggregation.pending import PendingGradients
from pinet_fast.aggregation.report import AggregationReport
from pinet_fast.aggregation.rules import ConstantRule, Rule, by_name
from pinet_fast.aggregation.session import Session
from pinet_fast.aggregation.sharing import shared
from pinet_fast.aggregation.strata_index import StrataIndex
from pinet_fast.aggregation.trace_plan import TracePlan
from pinet_fast.errors import AggregationError, ConfigError, StrataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pinet_fast.aggregation.coverage import Coverage
    from pinet_fast.aggregation.slice_rule import SliceProof

_STATE_KEY = "pinet_fast"

_SAVED = (
    "inner", "rule", "num_strata", "counts", "mode", "absent", "leaks", "report_every",
    "_num_steps",
)  # fmt: skip

Leaks = Literal["error", "attribute-by-row"]


class GradientAggregator(Optimizer):
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

    wraps_optimizer = True

    def __init__(
        self,
        opt: Optimizer | Sequence[Optimizer],
        rule: str | Rule | Callable[[Tensor], Tensor] = "backdoor",
        *,
        num_strata: int | None = None,
        counts: Sequence[int] | None = None,
        check: CheckMode = "first",
        mode: Literal["one-pass", "exact"] = "one-pass",
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
        if mode not in ("one-pass", "exact"):
            raise ConfigError(f'mode: expected "one-pass" or "exact", got {mode!r}')
        if report_every is not None and report_every < 1:
            raise ConfigError(f"report_every: expected a number >= 1, got {report_every}")
        keep_freed_memory()
        super().__init__(inner.param_groups, inner.defaults)
        self.inner: Optimizer = inner
        self.rule: Rule = by_name(rule)
        self.num_strata = num_strata
        self.counts = None if counts is None else tuple(counts)
        self.mode = mode
        self.absent: Absent = absent
        self.leaks: Leaks = leaks
        self.report_every = report_every
        self.report = AggregationReport(mode="plain")
        self._check = LeakCheck(check)
        self._reset()
        self._alias()

    def _reset(self) -> None:
        self._session: Session | None = None
        self._pending = PendingGradients()
        self._inside = False
        self._fresh = False
        self._num_steps = 0
        self._names: list[str] = []
        self._slice_proofs: dict[Any, SliceProof] = {}
        self._plan = TracePlan()
        self._known_parameters: list[Tensor] = []
        self._dense_parameters: list[int] = []  # of the last forward, for the next one
        self._warned_plain = False

    def _alias(self) -> None:
        """Share the inner optimizer's state, so that both always are one."""
        if isinstance(self.inner, JoinedOptimizers):
            self.inner.refresh()
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self.defaults = self.inner.defaults

    # Capture ------------------------------------------------------------------------------------

    @contextmanager
    def stratify(
        self,
        strata: StrataIndex | Tensor | Sequence[int],
        *,
        num_strata: int | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        rows: Mapping[str, tuple[int, Tensor | Sequence[int]]] | None = None,
        reduction: Reduction | None = None,
        row_weights: Tensor | None = None,
    ) -> Iterator[None]:
        """Compute the forward of one batch inside this context.

        Args:
            strata: A StrataIndex (the loader's ``batch.strata``), or the stratum of every user,
                int [B] in any order.
            num_strata: S, where ``strata`` are raw ids and the constructor was not told.
            lengths: Events of every user, [B], where raw ids belong to a ragged batch.
            rows: Declared layouts, where neither sizes nor the graph tell: by parameter name (as
                in ``coverage()``), the dimension that holds rows in what the parameter meets and
                the stratum id of every position along it, as in ``{"pos.weight": (0, ids)}``.
            reduction: For loops that call ``loss.backward()`` on a scalar: how it was reduced over
                the rows, ``"mean"`` or ``"sum"``; ``p.grad`` is aggregated when that call returns.
                A scalar cannot be checked for leaks: prove the model once with
                ``opt.backward(losses)``.
            row_weights: With ``reduction``: weights of the rows in it, a mask for example, [B],
                [T] or [B, L]; None = every event where lengths are known, else every user, counts
                alike.

        Raises:
            AggregationError: Contexts of one aggregator are nested, or something that is outside
                what stratum gradients can do: several ranks, sharded parameters.
            StrataError: Ids out of range or another number of strata than before.
            ConfigError: An unknown reduction, or a name in ``rows`` that no parameter has.
        """
        if self._inside:
            raise AggregationError("stratify: the contexts of one GradientAggregator cannot nest")
        if row_weights is not None and reduction is None:
            raise ConfigError(
                "stratify: row_weights describe a reduction; add reduction=, or give them to "
                "opt.backward(losses, weights)"
            )
        if reduction is not None and self.mode == "exact":
            raise ConfigError(
                'stratify: mode="exact" needs the losses of the rows; call opt.backward(losses) '
                "instead of reduction="
            )
        self._alias()
        index = self._strata_index(strata, num_strata, lengths)
        parameters, names = self._parameters()
        self._forget_others(parameters)
        self._names = names  # as the leak check's sites count them
        _check_names(rows or {}, names)
        if parameters:
            index = index.to(parameters[0].device)
        wanted = reduction is not None or self._wants_stratum_gradients()
        intercept = wanted and self.mode == "one-pass"
        if wanted:
            refuse_outside_envelope(parameters, names, check=self._check, intercept=intercept)
        session = Session(
            parameters,
            names,
            index,
            check=self._check,
            slice_proofs=self._slice_proofs,
            intercept=intercept,
            declared=rows,
            on_scalar=None if reduction is None else self._finish_scalar,
            plan=self._plan if intercept and is_compiler_used() and can_trace() else None,
        )
        session.attributes_leaks = self.leaks == "attribute-by-row"
        if reduction is not None:
            session.scalar = ScalarLoss.of(reduction, row_weights, session.rows)
        self._session, self._inside = session, True
        try:
            with profiling.FORWARD, ExitStack() as stack:
                if wanted:
                    stack.enter_context(compiled_modules(run_graphs=session.is_traced))
                if session.interception is not None:
                    session.interception.prepare(
                        [i for i in self._dense_parameters if i < len(parameters)]
                    )
                    stack.enter_context(session.interception)
                yield
            self._dense_parameters = session.leaves.dense_parameters()
        except BaseException:
            self._session = None
            raise
        finally:
            self._inside = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Mark work inside ``stratify`` whose rows belong to no user.

        In-batch negatives, candidate pools, a prototype of the whole batch: what is computed inside
        counts as computed from parameters alone. Its gradient belongs to the stratum whose loss
        used it, wherever its rows came from. Models that do not know their optimizer say
        ``with pinet_fast.shared():``.

        Example::

            with opt.stratify(strata):
                users = model(batch)                       # [B, d]
                with opt.shared():
                    pool = model.items(batch.targets)      # [B, d], candidates of everybody
                losses = F.cross_entropy(users @ pool.T, torch.arange(B), reduction="none")

        Raises:
            AggregationError: Outside ``stratify``.
        """
        if not self._inside or self._session is None:
            raise AggregationError(
                "shared: only inside `with opt.stratify(...)`, around the work whose rows belong "
                "to no user"
            )
        with shared():
            yield

    def _wants_stratum_gradients(self) -> bool:
        due = self.report_every is not None and self._num_steps % self.report_every == 0
        return due or not isinstance(self.rule.active, ConstantRule)

    def _strata_index(
        self,
        strata: StrataIndex | Tensor | Sequence[int],
        num_strata: int | None,
        lengths: Tensor | Sequence[int] | None,
    ) -> StrataIndex:
        expected = num_strata or self.num_strata
        if not isinstance(strata, StrataIndex):
            ids = torch.as_tensor(strata)
            if expected is None:
                expected = int(ids.max()) + 1 if ids.numel() else 1
            strata = StrataIndex(ids, expected, lengths)
        elif lengths is not None:
            raise StrataError("stratify: a StrataIndex carries its lengths; drop lengths=")
        if self.num_strata is None:
            self.num_strata = strata.num_strata
        if strata.num_strata != self.num_strata:
            raise StrataError(
                f"stratify: expected {self.num_strata} strata, as before; got {strata.num_strata}"
            )
        return strata

    def _parameters(self) -> tuple[list[Tensor], list[str]]:
        parameters: list[Tensor] = []
        names: list[str] = []
        for g, group in enumerate(self.param_groups):
            known = group.get("param_names")
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    parameters.append(p)
                    names.append(known[i] if known else f"parameter {i} of group {g}")
        return parameters, names

    def _forget_others(self, parameters: list[Tensor]) -> None:
        """Forget what was proven where parameters were frozen or thawed: it counts positions."""
        known, self._known_parameters = self._known_parameters, parameters
        if len(known) <= len(parameters) and all(map(operator.is_, known, parameters)):
            return  # the same, or some more
        self._check.forget()
        self._slice_proofs.clear()
        self._dense_parameters = []

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
            _check_scalar(losses, weights)
            with torch._C.DisableTorchFunction(), replay(session.interception):
                torch.autograd.backward(losses)
            return
        self._session = None
        with torch._C.DisableTorchFunction():
            reduced = stratum_losses(losses, weights, session.rows)
            if not any(reduced.rows.present):
                raise AggregationError("backward: every stratum is empty (no loss rows)")
            if session.interception is not None or self._wants_stratum_gradients():
                mark_terms(losses)
                with profiling.BACKWARD:
                    collected = session.stratum_gradients(reduced, self._num_steps)
                self.report = self._combination(session).run(collected, reduced.rows, reduced)
            else:
                self.report = self._backward_reweighted(session, reduced)
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

    def _backward_reweighted(self, session: Session, losses: StratumLosses) -> AggregationReport:
        weights = self._combination(session).constant_weights(losses.rows)
        factors = losses.values.new_tensor(weights)
        with profiling.BACKWARD:
            torch.autograd.backward(losses.values, factors)
        return AggregationReport(
            mode="reweighted",
            counts=losses.rows.counts,
            unit=losses.rows.unit,
            losses=reported_losses(losses),
            weights=torch.tensor(weights, dtype=torch.float64),
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
        self.inner.zero_grad(set_to_none=set_to_none)

    # State --------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer."""
        if "inner" in self.__dict__:
            self.inner.add_param_group(param_group)
        else:  # called by Optimizer.__init__, before the groups are shared
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, and the aggregator's under one further key."""
        own = {
            "version": 1,
            "num_steps": self._num_steps,
            "num_strata": self.num_strata,
            "rule": self.rule.state_dict(),
        }
        return {**self.inner.state_dict(), _STATE_KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of the bare wrapped optimizer."""
        own = state_dict.get(_STATE_KEY, {})
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != _STATE_KEY})
        self._alias()
        self._num_steps = own.get("num_steps", 0)
        self.num_strata = own.get("num_strata", self.num_strata)
        if own:
            self.rule.load_state_dict(own["rule"])

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {k: v for k, v in self.__dict__.items() if k in _SAVED}
        return {**state, "check": self._check.mode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inner: Optimizer = state["inner"]
        super().__setstate__({"defaults": inner.defaults})  # sets up the hook registries
        self._reset()
        self._check = LeakCheck(state["check"])
        self.report = AggregationReport(mode="plain")
        self.__dict__.update({k: v for k, v in state.items() if k != "check"})
        self._alias()

    def coverage(self) -> Coverage:
        """Return one entry a boundary: parameter, op, row layout, and when it was proven.

        Printed, it is one line each, with slice-rule and unproven entries marked.
        """
        return self._check.coverage_of(self._names)

    def __repr__(self) -> str:
        return f"GradientAggregator(rule={self.rule!r}, inner={self.inner!r})"


def _check_names(rows: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in rows:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"stratify: rows= declares {name!r}, which names no parameter{hint}; names are "
                "those of coverage(), and of the module where the optimizer was given "
                "model.named_parameters()"
            )


def _dense(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad


def _check_scalar(losses: Tensor, weights: Tensor | None) -> None:
    if losses.dim() or weights is not None:
        raise AggregationError(
            f"backward: stratify(reduction=...) expects the reduced scalar without weights, got "
            f"losses of shape {list(losses.shape)}; drop reduction= to have one loss a row reduced "
            "here"
        )
