"""GradientAggregator: an optimizer wrapper whose gradients are aggregated over strata."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from pinet_fast import profiling
from pinet_fast.aggregation.leak_check import CheckMode, LeakCheck
from pinet_fast.aggregation.report import AggregationReport, LeakState
from pinet_fast.aggregation.rules import (
    ConstantRule,
    ElementwiseRule,
    GramRule,
    Rule,
    by_name,
)
from pinet_fast.aggregation.session import Session, StratumLosses, stratum_losses
from pinet_fast.aggregation.strata_index import StrataIndex
from pinet_fast.errors import AggregationError, ConfigError, StrataError
from pinet_fast.kernels import stratum_gram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pinet_fast.aggregation.slice_rule import SliceProof

_STATE_KEY = "pinet_fast"


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

    Several ``backward`` calls before a ``step`` add up their aggregated gradients: for constant
    rules the gradient of the larger batch, for rules that depend on gradients the sum of what the
    rule made of each part.

    Args:
        opt: The optimizer to wrap.
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
        report_every: Compute stratum gradients, for the report's Gram, at every k-th step also for
            constant rules; None = never.

    Raises:
        ConfigError: An unknown rule or check, or something that is no optimizer.
    """

    def __init__(
        self,
        opt: Optimizer,
        rule: str | Rule | Callable[[Tensor], Tensor] = "backdoor",
        *,
        num_strata: int | None = None,
        counts: Sequence[int] | None = None,
        check: CheckMode = "first",
        mode: Literal["one-pass", "exact"] = "one-pass",
        report_every: int | None = None,
    ) -> None:
        if not isinstance(opt, Optimizer):
            raise ConfigError(
                "GradientAggregator: expected a torch.optim.Optimizer, got "
                f"{type(opt).__name__}; wrap the optimizer you have, as in "
                "GradientAggregator(torch.optim.Adam(model.parameters()))"
            )
        if isinstance(opt, GradientAggregator):
            raise ConfigError("GradientAggregator: the optimizer is wrapped already")
        if mode not in ("one-pass", "exact"):
            raise ConfigError(f'mode: expected "one-pass" or "exact", got {mode!r}')
        if report_every is not None and report_every < 1:
            raise ConfigError(f"report_every: expected a number >= 1, got {report_every}")
        super().__init__(opt.param_groups, opt.defaults)
        self.inner = opt
        self.rule: Rule = by_name(rule)
        self.num_strata = num_strata
        self.counts = None if counts is None else tuple(counts)
        self.mode = mode
        self.report_every = report_every
        self.report = AggregationReport(mode="plain")
        self._check = LeakCheck(check)
        self._reset()
        self._alias()

    def _reset(self) -> None:
        self._session: Session | None = None
        self._inside = False
        self._fresh = False
        self._num_steps = 0
        self._names: list[str] = []
        self._slice_proofs: dict[Any, SliceProof] = {}
        self._warned_plain = False

    def _alias(self) -> None:
        """Share the inner optimizer's state, so that both always are one."""
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
    ) -> Iterator[None]:
        """Compute the forward of one batch inside this context.

        Args:
            strata: A StrataIndex (the loader's ``batch.strata``), or the stratum of every user,
                int [B] in any order.
            num_strata: S, where ``strata`` are raw ids and the constructor was not told.
            lengths: Events of every user, [B], where raw ids belong to a ragged batch.

        Raises:
            AggregationError: Contexts of one aggregator are nested.
            StrataError: Ids out of range or another number of strata than before.
        """
        if self._inside:
            raise AggregationError("stratify: the contexts of one GradientAggregator cannot nest")
        index = self._strata_index(strata, num_strata, lengths)
        parameters, names = self._parameters()
        self._names = names  # as the leak check's sites count them
        if parameters:
            index = index.to(parameters[0].device)
        wanted = self._wants_stratum_gradients()
        if wanted:
            _refuse_ranks()
        intercept = wanted and self.mode == "one-pass"
        session = Session(
            parameters,
            names,
            index,
            check=self._check,
            slice_proofs=self._slice_proofs,
            intercept=intercept,
        )
        self._session, self._inside = session, True
        try:
            with profiling.FORWARD, session.interception or nullcontext():
                yield
        except BaseException:
            self._session = None
            raise
        finally:
            self._inside = False

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
        self._session = None
        with torch._C.DisableTorchFunction():
            reduced = stratum_losses(losses, weights, session.rows)
            if not any(total > 0 for total in reduced.totals):
                raise AggregationError("backward: every stratum is empty (no loss rows)")
            if self._wants_stratum_gradients():
                self.report = self._backward_stratified(session, reduced)
            else:
                self.report = self._backward_reweighted(session, reduced)
        self._fresh = True

    def _backward_reweighted(self, session: Session, losses: StratumLosses) -> AggregationReport:
        rule = self.rule.active
        assert isinstance(rule, ConstantRule)
        weights = rule.weights(session.batch_strata(losses, self.counts))
        factors = losses.values.new_tensor(weights)
        with profiling.BACKWARD:
            torch.autograd.backward(losses.values, factors)
        return AggregationReport(
            mode="reweighted",
            counts=losses.counts,
            unit=losses.unit,
            losses=_reported(losses),
            weights=torch.tensor(weights, dtype=torch.float64),
        )

    def _backward_stratified(self, session: Session, losses: StratumLosses) -> AggregationReport:
        with profiling.BACKWARD:
            gradients = session.stratum_gradients(losses, self._num_steps)
        touched = [(p, g) for p, g in zip(session.parameters, gradients, strict=True) if g]
        if not touched:
            raise AggregationError(
                "backward: no parameter of the optimizer met a row of the batch inside stratify"
            )
        with profiling.GRAM:
            grams: Tensor = stratum_gram([g.values for _, g in touched])
        rule = self.rule.active
        weights = None
        if isinstance(rule, ElementwiseRule):
            present = [total > 0 for total in losses.totals]
            with profiling.COMBINE:
                for p, g in touched:
                    _add_gradient(p, g.spread(rule.aggregate(g.values, g.touched, present), p))
        else:
            with profiling.RULE:
                weights = self._weights(rule, grams, session, losses)
            with profiling.COMBINE:
                for (p, g), w in zip(touched, weights.expand(len(touched), -1), strict=True):
                    _add_gradient(p, g.combined(w, p))
        leak: LeakState = "unchecked"
        if self._check.mode != "never" and self.mode == "one-pass":
            armed = any(step is None for _, step in self._check.coverage())
            leak = "armed" if armed and self._check.mode == "first" else "proven"
        return AggregationReport(
            mode=self.mode,
            counts=losses.counts,
            unit=losses.unit,
            losses=_reported(losses),
            weights=weights,
            gram=grams.sum(0),
            leak=leak,
        )

    def _weights(
        self, rule: Rule, grams: Tensor, session: Session, losses: StratumLosses
    ) -> Tensor:
        """Return the rule's weights, float64 [S] or [n_params, S]; absent strata weigh 0."""
        if isinstance(rule, ConstantRule):
            return grams.new_tensor(rule.weights(session.batch_strata(losses, self.counts)))
        assert isinstance(rule, GramRule)
        gram = grams if rule.per_parameter else grams.sum(0)
        return rule.stratum_weights(gram, [total > 0 for total in losses.totals])

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
        if self._session is not None:
            raise AggregationError(
                "step: the forward was stratified but opt.backward(losses) was not called; "
                "losses.backward() alone leaves the parameters without gradient"
            )
        if not self._fresh:
            self._note_plain_step()
        with profiling.STEP:
            self.inner.step()
        if self._fresh:
            self.rule.commit()
        self._fresh = False
        self._num_steps += 1

    def _note_plain_step(self) -> None:
        self.report = AggregationReport(mode="plain")
        has_gradient = any(p.grad is not None for g in self.param_groups for p in g["params"])
        if has_gradient and not self._warned_plain:
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
        state: dict[str, Any] = {
            k: v
            for k, v in self.__dict__.items()
            if k in ("inner", "rule", "num_strata", "counts", "mode", "report_every", "_num_steps")
        }
        return {**state, "check": self._check.mode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inner: Optimizer = state["inner"]
        super().__setstate__(inner.__getstate__())  # sets up the hook registries
        self._reset()
        self._check = LeakCheck(state["check"])
        self.report = AggregationReport(mode="plain")
        self.__dict__.update({k: v for k, v in state.items() if k != "check"})
        self._alias()

    def coverage(self) -> str:
        """Return one line a boundary: parameter, op, row layout, and the step it was proven at."""
        names = self._names
        lines = []
        for site, step in self._check.coverage():
            who = "+".join(names[i] for i in site.parameter)
            proof = "unproven" if step is None else f"proven at step {step}"
            where = f"{site.kind} in dim {site.dim}, use {site.occurrence + 1}"
            lines.append(f"{who}: {site.op}, {where}: {proof}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"GradientAggregator(rule={self.rule!r}, inner={self.inner!r})"


def _refuse_ranks() -> None:
    """Stratum gradients are not reduced across ranks yet, and each rank would go its own way."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if (ranks := distributed.get_world_size()) > 1:
        raise AggregationError(
            f"stratify: this process is one of {ranks} ranks, and stratum gradients are not "
            'reduced across ranks yet; train on one, or use rule="joint" or "backdoor", which '
            "need none"
        )


def _reported(losses: StratumLosses) -> Tensor:
    absent = torch.tensor([total <= 0 for total in losses.totals])
    return losses.values.detach().cpu().masked_fill(absent, torch.nan)


@torch.no_grad()
def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
