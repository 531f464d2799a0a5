"""Runs one cell: S stratum gradients of the library against S plain autograd passes.

The library does not hand out its stratum gradients. With a rule that puts all weight on stratum
s, ``p.grad`` must equal ``g_s``; with ``report_every=1`` a constant rule runs the same path and
``p.grad`` must be the mix; ``report.gram`` must be the Gram of the oracle.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grid.layers import LAYERS
from grid.situations import MAY_REFUSE, NOT_APPLICABLE, REFUSED, SITUATIONS, Cell, Step
from pinet_fast import GradientAggregator
from pinet_fast.rules import Backdoor

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest error relative to the largest entry of the gradient of the parameter, or of all.

For bf16 it is a column of the layers: ``Layer.bf16``.
"""

Gradients = dict[str, Tensor]  # parameter name -> [S, *shape]


class Pick:
    """A rule as users write them: a function of the Gram, here with all weight on one stratum."""

    def __init__(self) -> None:
        self.place = 0  # among the strata present
        self.scale = 1.0

    def __call__(self, gram: Tensor) -> Tensor:
        weights = torch.zeros(len(gram), dtype=gram.dtype)
        weights[self.place] = self.scale
        return weights


@dataclass
class Run:
    """A cell with its aggregator, and the compiled model where it is compiled."""

    cell: Cell
    rule: object
    report_every: int | None = None
    opt: GradientAggregator = field(init=False)
    model: torch.nn.Module = field(init=False)
    num_graphs: int = 0  # compiled so far

    def __post_init__(self) -> None:
        model = self.cell.model
        tables = [m for m in model.modules() if getattr(m, "sparse", False)]
        sparse = {id(m.weight) for m in tables}
        named = list(model.named_parameters())
        dense = [(n, p) for n, p in named if id(p) not in sparse]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(dense, lr=0.1)]
        if tables:
            items = [(n, p) for n, p in named if id(p) in sparse]
            optimizers.append(torch.optim.SparseAdam(items, lr=0.1))
        self.opt = GradientAggregator(
            optimizers if tables else optimizers[0],  # type: ignore[arg-type]
            self.rule,  # type: ignore[arg-type]
            report_every=self.report_every,
        )
        self.model = model
        if self.cell.compiler is not None:
            torch._dynamo.reset()
            self.model = torch.compile(model, backend=self._counting_backend(self.cell.compiler))

    def _counting_backend(self, name: str) -> Callable[..., Any]:
        backend = torch._dynamo.lookup_backend(name)

        def count_and_compile(graph: Any, example_inputs: Any) -> Any:
            self.num_graphs += 1
            return backend(graph, example_inputs)

        return count_and_compile

    def step(self, step: Step) -> None:
        """Forward and backward of one batch."""
        cell = self.cell
        if cell.shared:
            cell.model.pool = self.opt.shared  # type: ignore[attr-defined, assignment]
        try:
            with (
                self.opt.stratify(step.ids, num_strata=cell.num_strata, **step.options),
                cell.around(),
            ):
                losses = step.losses(self.model)
                if cell.scalar:
                    losses = losses.mean()
            if cell.scalar:
                losses.backward()
            else:
                self.opt.backward(losses, weights=step.weights)
        finally:
            if cell.shared:
                cell.model.pool = nullcontext  # type: ignore[attr-defined, assignment]

    def gradients(self) -> dict[str, Tensor | None]:
        """Return ``p.grad`` of the cell's steps, from nothing."""
        self.opt.zero_grad()
        for step in self.cell.steps:
            self.step(step)
        return {n: p.grad for n, p in self.cell.model.named_parameters()}


def stratum_losses(cell: Cell, step: Step, index: int) -> Tensor:
    """Return the weighted mean loss of one stratum, from a plain forward of the whole batch."""
    with cell.around():
        values = step.losses(cell.model).flatten()
    weights = torch.ones_like(values) if step.weights is None else step.weights.flatten()
    rows = step.row_ids == index
    mean: Tensor = (values * weights)[rows].sum() / weights[rows].sum()
    return mean


def oracle(cell: Cell, step: Step) -> Gradients:
    """S plain backward passes: zero the gradients, mean loss of one stratum, backward, copy."""
    named = dict(cell.model.named_parameters())
    result = {n: p.new_zeros((cell.num_strata, *p.shape)) for n, p in named.items()}
    free = None
    for s in range(cell.num_strata):
        if not bool((step.row_ids == s).any()):
            continue
        cell.model.zero_grad()
        loss = stratum_losses(cell, step, s)
        if cell.batch_free is not None:
            free = cell.batch_free(cell.model)
            loss = loss - free  # the step's losses contain it: what is left are the rows
        loss.backward()
        for n, p in named.items():
            if p.grad is not None:
                result[n][s] = p.grad.to_dense() if p.grad.is_sparse else p.grad
    cell.model.zero_grad()
    return result


def batch_free_gradients(cell: Cell) -> Gradients:
    """Return the gradient of the term without rows, zero where there is none."""
    named = dict(cell.model.named_parameters())
    if cell.batch_free is None:
        return {n: torch.zeros_like(p) for n, p in named.items()}
    trained = {n: p for n, p in named.items() if p.requires_grad}
    parts = torch.autograd.grad(
        cell.batch_free(cell.model), list(trained.values()), allow_unused=True
    )
    found = {n: g for n, g in zip(trained, parts, strict=True) if g is not None}
    return {n: found.get(n, torch.zeros_like(p)) for n, p in named.items()}


def assert_close(
    got: dict[str, Tensor | None], want: Gradients, tolerance: float, what: str, scale: float
) -> None:
    """Compare every parameter; a missing gradient stands for zeros."""
    for name, expected in want.items():
        mine = got[name]
        dense = torch.zeros_like(expected) if mine is None else mine
        dense = dense.to_dense() if dense.is_sparse else dense
        assert dense.dtype == expected.dtype, f"{what}: {name} has dtype {dense.dtype}"
        error = float((dense - expected).abs().max())
        # Gradients that are zero but for rounding (key biases) are held to the largest one's.
        bound = tolerance * max(float(expected.abs().max()), 1e-3 * scale)
        bound = max(bound, torch.finfo(expected.dtype).eps * scale)  # terms that cancel are rounded
        assert error <= bound, f"{what}: {name} is off by {error:.3g}, allowed {bound:.3g}"


def check_kinds(cell: Cell, got: dict[str, Tensor | None], what: str) -> None:
    """Frozen and unused parameters have no gradient; sparse tables have a sparse one."""
    for name, p in cell.model.named_parameters():
        grad = got[name]
        if not p.requires_grad or name.startswith("extra."):
            assert grad is None or not grad.any(), f"{what}: {name} got a gradient"
        elif getattr(cell.model.layer, "sparse", False) and name == "layer.weight":
            assert grad is not None, f"{what}: {name} has no gradient"
            assert grad.is_sparse, f"{what}: {name}.grad is dense, its module says sparse=True"


def run_cell(cell: Cell) -> None:
    """Assert that all S stratum gradients, a mix of them, and the Gram are the oracle's."""
    dtype = next(cell.model.parameters()).dtype
    tolerance = TOLERANCE[dtype] if cell.tolerance is None else cell.tolerance
    parts = [oracle(cell, step) for step in cell.steps]
    want = {n: torch.stack([part[n] for part in parts]).sum(0) for n in parts[0]}
    free = batch_free_gradients(cell)
    scale = max(float(w.abs().max()) for w in want.values())
    present = [
        s for s in range(cell.num_strata) if any(bool((x.row_ids == s).any()) for x in cell.steps)
    ]

    pick = Pick()
    run = Run(cell, pick)
    for step in cell.history:
        run.opt.zero_grad()
        run.step(step)
    pick.scale = 2.0 if cell.batch_free is not None else 1.0  # the term does not scale with it
    # The first pass runs while the leak check is armed; the first stratum comes again, proven.
    for place, s in [*enumerate(present), (0, present[0])]:
        pick.place = place
        got = run.gradients()
        expected = {n: pick.scale * w[s] + len(cell.steps) * free[n] for n, w in want.items()}
        assert_close(got, expected, tolerance, f"stratum {s}", scale)
        check_kinds(cell, got, f"stratum {s}")
    if cell.compiler is not None:
        assert (run.num_graphs > 0) == cell.is_traced, f"{run.num_graphs} graphs were compiled"
    if len(cell.steps) == 1:
        flat = torch.cat([w.flatten(1).double() for w in want.values()], dim=1)
        gram = run.opt.report.gram
        assert gram is not None, "report.gram is missing"
        error = float((gram - flat @ flat.T).abs().max() / (flat @ flat.T).abs().max())
        assert error <= 2 * tolerance, f"report.gram is off by {error:.3g}"

    prior = torch.arange(1.0, cell.num_strata + 1, dtype=torch.float64)
    weights = torch.zeros(cell.num_strata, dtype=torch.float64)
    weights[present] = prior[present] / prior[present].sum()
    mixed = Run(cell, Backdoor(prior), report_every=1)
    for step in cell.history:
        mixed.opt.zero_grad()
        mixed.step(step)
    got = mixed.gradients()
    assert mixed.opt.report.mode == "one-pass", f"report.mode is {mixed.opt.report.mode!r}"
    expected = {
        n: torch.einsum("s,s...->...", weights.to(w.dtype), w) + len(cell.steps) * free[n]
        for n, w in want.items()
    }
    assert_close(got, expected, tolerance, "backdoor mix", scale)
    run.opt.step()  # optimizers take what they got: SparseAdam refuses dense gradients


@dataclass(frozen=True)
class Outcome:
    """What a cell did: ``exact``, ``refused``, ``n/a`` or ``FAILED``; with the reason."""

    kind: str
    detail: str = ""
    error: BaseException | None = field(default=None, compare=False, repr=False)


def outcome_of(layer: str, situation: str, dtype: torch.dtype) -> Outcome:
    """Run one cell and compare what it did with what it may do."""
    if (situation, layer) in NOT_APPLICABLE:
        return Outcome("n/a", NOT_APPLICABLE[situation, layer])
    torch.manual_seed(0)
    make: Callable[..., Cell] = SITUATIONS[situation]
    cell = make(LAYERS[layer], dtype)
    if cell.tolerance is None and dtype is torch.bfloat16:
        cell.tolerance = LAYERS[layer].bf16
    must, may = REFUSED.get(situation), MAY_REFUSE.get(situation)
    before = copy.deepcopy(cell.model.state_dict())
    try:
        if must is None:
            run_cell(cell)
        else:
            Run(cell, Pick()).gradients()  # no oracle: it would move BatchNorm's statistics
    except Exception as error:
        line = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        allowed = must or may
        if allowed is None or not isinstance(error, allowed):
            return Outcome("FAILED", line, error)
        for name, value in cell.model.state_dict().items():
            counter = name.endswith("num_batches_tracked")  # nn.BatchNorm counts, then calls
            if not counter and not torch.equal(value, before[name]):
                return Outcome("FAILED", f"{line}; and {name} was changed", error)
        return Outcome("refused", type(error).__name__)
    if must is not None:
        return Outcome("FAILED", f"no error; expected {must.__name__}")
    return Outcome("exact")


@cache
def outcome(layer: str, situation: str, dtype: torch.dtype) -> Outcome:
    """Return :func:`outcome_of`, run once."""
    return outcome_of(layer, situation, dtype)
