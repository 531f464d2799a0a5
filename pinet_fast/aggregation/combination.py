"""From stratum gradients to ``p.grad``: Gram, rule, weighted sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pinet_fast import profiling
from pinet_fast.aggregation import compiled
from pinet_fast.aggregation.report import AggregationReport, LeakState
from pinet_fast.aggregation.rules import ConstantRule, ElementwiseRule, GramRule, Rule
from pinet_fast.errors import AggregationError
from pinet_fast.kernels import _registry, stratum_gram
from pinet_fast.kernels.stratum_combine import combine_unchecked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.aggregation.collection import Collected
    from pinet_fast.aggregation.losses import LossRows
    from pinet_fast.aggregation.pending import PendingGradients
    from pinet_fast.aggregation.session import Session
    from pinet_fast.aggregation.stratum_gradient import StratumGradient
    from pinet_fast.aggregation.stratum_losses import StratumLosses

Absent = Literal["renormalise", "skip"]


class Combination:
    """Combines the stratum gradients of one backward.

    Args:
        rule: The rule in force.
        session: The stratified forward that they come from.
        pending: Stratum gradients since the last step; ``p.grad`` is written through it.
        counts: Population counts of the strata, where the user gave them.
        absent: What constant rules make of strata that the batch lacks.
    """

    def __init__(
        self,
        rule: Rule,
        session: Session,
        pending: PendingGradients,
        *,
        counts: Sequence[int] | None,
        absent: Absent,
    ) -> None:
        self.rule = rule
        self.session = session
        self.pending = pending
        self.counts = counts
        self.absent = absent

    def constant_weights(self, rows: LossRows) -> tuple[float, ...]:
        """Return the weights of a constant rule for a batch of these rows."""
        assert isinstance(self.rule, ConstantRule)
        renormalise = self.absent == "renormalise"
        batch = self.session.batch_strata(rows, self.counts, renormalise=renormalise)
        return tuple(map(float, self.rule.weights(batch)))  # a rule of users' may give a list

    def run(self, collected: Collected, rows: LossRows, losses: Tensor | None) -> AggregationReport:
        """Write ``p.grad``.

        Args:
            collected: What the backward left.
            rows: The loss rows by stratum.
            losses: The mean losses by stratum, [S], for the report; None where only a scalar was
                seen.

        Raises:
            AggregationError: No parameter met a row of the batch.
        """
        if isinstance(self.rule, ConstantRule):
            self.pending.clear()  # weights are the batch's own: each backward stands for itself
        present = self.pending.add(self.session.parameters, collected, rows.present)
        touched = self.pending.touched()
        if not touched:
            raise AggregationError(
                "backward: no parameter of the optimizer met a row of the batch inside stratify; "
                "give the optimizer the parameters of this model, and call the model inside "
                "`with opt.stratify(batch.strata):`"
            )
        with profiling.GRAM:
            grams, whole = _grams([g.values for _, g in touched])
        weights = None
        if isinstance(self.rule, ElementwiseRule):
            with profiling.COMBINE:
                combined = [
                    g.spread(self.rule.aggregate(g.values, g.touched, present), p)
                    for p, g in touched
                ]
            self.pending.write(combined)
        else:
            with profiling.RULE:
                weights = self._weights(grams, whole, present, rows)
            with profiling.COMBINE:
                if not self.pending.write_weighted(weights):
                    self.pending.write(_mixed(touched, weights))
        session = self.session
        return AggregationReport(
            mode="exact" if session.interception is None else "one-pass",
            counts=rows.counts,
            unit=rows.unit,
            losses=None if losses is None else reported_losses(losses, rows),
            weights=weights,
            gram=whole,
            leak=_leak_state(session),
        )

    def run_reweighted(self, losses: StratumLosses) -> AggregationReport:
        """Write ``p.grad`` by one plain backward of the losses times a constant rule's weights."""
        weights = self.constant_weights(losses.rows)
        means = losses.reduce(weights)
        # Before the backward, which leaves neither this code nor the losses in the caches.
        report = AggregationReport(
            mode="reweighted",
            counts=losses.rows.counts,
            unit=losses.rows.unit,
            losses=reported_losses(means, losses.rows),
            weights=torch.tensor(weights, dtype=torch.float64),
        )
        with profiling.BACKWARD:
            losses.backward()
        return report

    def _weights(
        self, grams: Tensor, whole: Tensor, present: Sequence[bool], rows: LossRows
    ) -> Tensor:
        """Return the rule's weights, float64 [S] or [n_params, S]; absent strata weigh 0."""
        if isinstance(self.rule, ConstantRule):
            return grams.new_tensor(self.constant_weights(rows))
        assert isinstance(self.rule, GramRule)
        return self.rule.stratum_weights(grams if self.rule.per_parameter else whole, present)


def _grams(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the Gram of every parameter, float64 [P, S, S], and that of the whole model."""
    functions = compiled.functions()
    if functions is not None and _registry.is_first("cpp", ("stratum_gram",)):
        found: tuple[Tensor, Tensor] | None = functions.gram(values)
        if found is not None:
            _registry.record_call("stratum_gram", "cpp")
            return found
    grams: Tensor = stratum_gram(values)
    return grams, grams.sum(0)


def _mixed(touched: Sequence[tuple[Tensor, StratumGradient]], weights: Tensor) -> list[Tensor]:
    """Return ``sum_s w_s g_s`` of every parameter, by one call a device."""
    outs = [
        g.values.new_empty(g.values.shape[1:]) if g.rows is None or g.is_sparse
        else torch.empty_like(p, memory_format=torch.contiguous_format)
        for p, g in touched
    ]  # fmt: skip
    for device in dict.fromkeys([out.device for out in outs]):
        here = [i for i, out in enumerate(outs) if out.device == device]
        of_these = weights if weights.dim() == 1 or len(here) == len(outs) else weights[here]
        combine_unchecked(
            [touched[i][1].values for i in here],
            of_these.to(device),
            [outs[i] for i in here],
            [None if touched[i][1].is_sparse else touched[i][1].rows for i in here],
        )
    return [
        g.spread(out, p) if g.is_sparse else out for (p, g), out in zip(touched, outs, strict=True)
    ]


def _leak_state(session: Session) -> LeakState:
    check = session.check
    if session.saw_leak:
        return "attributed-by-row"
    if check.mode == "never" or session.interception is None or session.scalar is not None:
        return "unchecked"
    return "armed" if check.mode == "first" and check.has_unproven else "proven"


def reported_losses(means: Tensor, rows: LossRows) -> Tensor:
    """Return the stratum losses on the host, [S]; NaN for absent strata."""
    values, present = means.cpu(), rows.present
    if all(present):
        return values
    return values.masked_fill(torch.tensor([not here for here in present]), torch.nan)
