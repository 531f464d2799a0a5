"""Stratified forwards: an optimizer wrapper that knows which stratum every row belongs to."""

from __future__ import annotations

import operator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pinet_fast import profiling
from pinet_fast.aggregation.compiler_names import can_trace
from pinet_fast.aggregation.envelope import (
    compiled_modules,
    is_compiler_used,
    refuse_compiled_step,
    refuse_outside_envelope,
)
from pinet_fast.aggregation.lane import Lanes
from pinet_fast.aggregation.leak_check import CheckMode, LeakCheck
from pinet_fast.aggregation.losses import Reduction, ScalarLoss
from pinet_fast.aggregation.roots import roots_of
from pinet_fast.aggregation.session import Session
from pinet_fast.aggregation.sharing import shared
from pinet_fast.aggregation.strata_index import StrataIndex
from pinet_fast.aggregation.trace_plan import TracePlan
from pinet_fast.aggregation.wrapper import OptimizerWrapper
from pinet_fast.errors import AggregationError, ConfigError, StrataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from pinet_fast.aggregation.coverage import Coverage
    from pinet_fast.aggregation.leaves import Root
    from pinet_fast.aggregation.slice_proof import SliceProof

_NOTHING = nullcontext()

Mode = Literal["one-pass", "exact"]
Leaks = Literal["error", "attribute-by-row"]


class StratifyingOptimizer(OptimizerWrapper):
    """The forward half of ``GradientAggregator``: one session for every ``stratify``.

    It keeps what earlier forwards established: what the leak check and the slice rule proved, and
    what graphs may be compiled from. A subclass runs the backward of a session.

    Args:
        inner: The optimizer to wrap.
        num_strata: S, or None until the first strata come.
        check: When boundaries are proven.
        mode: Whether forwards are intercepted.
        leaks: What the leak check does where users mix.

    Raises:
        ConfigError: An unknown check.
    """

    def __init__(
        self,
        inner: Optimizer,
        *,
        num_strata: int | None,
        check: CheckMode,
        mode: Mode,
        leaks: Leaks,
    ) -> None:
        super().__init__(inner)
        self.num_strata = num_strata
        self.mode: Mode = mode
        self.leaks: Leaks = leaks
        self._know_nothing(check)

    def _know_nothing(self, check: CheckMode) -> None:
        self._check = LeakCheck(check)
        self._session: Session | None = None
        self._inside = False
        self._names: list[str] = []
        self._slice_proofs: dict[Any, SliceProof] = {}
        self._plan = TracePlan()
        self._known_parameters: list[Tensor] = []
        self._roots: dict[int, Root] = {}
        self._dense_parameters: list[int] = []  # of the last forward, for the next one
        self._lanes = Lanes()

    def _wants_stratum_gradients(self) -> bool:
        """Return whether this step needs them: a rule of weights known before does not."""
        raise NotImplementedError

    def _needs_touched_rows(self) -> bool:
        """Return whether it matters which stratum touched which row of a table."""
        raise NotImplementedError

    def _finish_scalar(self) -> None:
        """Aggregate at the end of a backward on a scalar; called by the engine."""
        raise NotImplementedError

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
                what stratum gradients can do: several ranks, sharded or complex
                parameters.
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
        wanted = reduction is not None or self._wants_stratum_gradients()
        if wanted:
            refuse_compiled_step()
        self._alias()
        index = self._strata_index(strata, num_strata, lengths)
        parameters = self._parameters()
        self._know(parameters)
        names = self._names
        if rows:
            _check_names(rows, names)
        if parameters:
            index = index.to(parameters[0].device)
        session = self._open(index, parameters, names, wanted, rows, reduction, row_weights)
        self._session, self._inside = session, True
        try:
            compiled: AbstractContextManager[None] = _NOTHING
            if session.is_stratified:
                compiled = compiled_modules(run_graphs=session.is_traced)
            with profiling.FORWARD, compiled:
                if session.interception is None:
                    yield
                else:
                    session.interception.prepare(self._dense_parameters)
                    with session.interception:
                        yield
            if session.interception is not None and session.interception.prepares_leaves:
                self._dense_parameters = session.leaves.dense_parameters()
        except BaseException:
            self._session = None
            raise
        finally:
            self._inside = False

    def _open(
        self,
        index: StrataIndex,
        parameters: list[Tensor],
        names: list[str],
        wanted: bool,
        rows: Mapping[str, tuple[int, Tensor | Sequence[int]]] | None,
        reduction: Reduction | None,
        row_weights: Tensor | None,
    ) -> Session:
        """Return the session of a forward.

        Args:
            index: The batch's strata, on the device of the parameters.
            parameters: The trainable ones.
            names: Theirs.
            wanted: Whether stratum gradients are.
            rows: As of :meth:`stratify`, as all that follow.
            reduction: Or None.
            row_weights: Or None.
        """
        intercept = wanted and self.mode == "one-pass"
        if wanted:
            refuse_outside_envelope(parameters, names, check=self._check, intercept=intercept)
        plan = self._plan if intercept and is_compiler_used() and can_trace() else None
        lane = None
        if intercept and plan is None and reduction is None and not rows:
            lane = self._lanes.find(parameters, self._check)
        session = Session(
            parameters,
            names,
            index,
            check=self._check,
            roots=self._roots,
            slice_proofs=self._slice_proofs,
            intercept=intercept,
            declared=rows,
            on_scalar=None if reduction is None else self._finish_scalar,
            plan=plan,
            lane=lane,
        )
        session.is_stratified = wanted
        session.leaves.keeps_touched = self._needs_touched_rows()
        session.attributes_leaks = self.leaks == "attribute-by-row"
        if reduction is not None:
            session.scalar = ScalarLoss.of(reduction, row_weights, session.rows)
        return session

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

    def _know(self, parameters: list[Tensor]) -> None:
        """Forget what was proven where parameters were frozen or thawed: it counts positions."""
        known = self._known_parameters
        are_there = len(known) <= len(parameters) and all(map(operator.is_, known, parameters))
        if are_there and len(known) == len(parameters):
            return
        self._known_parameters = parameters
        self._names, self._roots = self._parameter_names(), roots_of(parameters)
        if are_there:
            return  # these and some more
        self._check.forget()
        self._slice_proofs.clear()
        self._dense_parameters = []
        self._lanes = Lanes()

    def coverage(self) -> Coverage:
        """Return one entry a boundary: parameter, op, row layout, and when it was proven.

        Printed, it is one line each, with slice-rule and unproven entries marked.
        """
        return self._check.coverage_of(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "num_strata": self.num_strata,
            "mode": self.mode,
            "leaks": self.leaks,
            "check": self._check.mode,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.num_strata, self.mode, self.leaks = (state[k] for k in ("num_strata", "mode", "leaks"))
        self._know_nothing(state["check"])


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
