"""The columns of the grid: each makes of a layer a cell that can be run and compared.

A situation is a function from (layer, dtype) to a :class:`Cell`. Where a layer makes no sense in
it, ``NOT_APPLICABLE`` says why and the cell is not counted.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grid import models
from grid.layers import LAYERS, NUM_ITEMS, D, Layer
from pinet_fast.errors import BoundaryError, RowLayoutError, StratumLeakError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

B, L = 6, 5
UNSORTED = (2, 0, 1, 1, 0, 2)
LENGTHS = (3, 1, 4, 2, 5, 2)  # of the ragged batch; T = 17 is no other size
LAMBDA = 0.01  # of the L2 term


@dataclass
class Step:
    """One ``stratify`` and one ``backward``."""

    ids: Tensor
    losses: Callable[[nn.Module], Tensor]  # of the model, or of its compiled twin
    row_ids: Tensor  # the stratum of every element of the losses, for the oracle
    weights: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of stratify


@dataclass
class Cell:
    """A model, the steps whose gradients are compared, and what may vary around them."""

    model: nn.Module
    steps: list[Step]
    num_strata: int = 3
    history: list[Step] = field(default_factory=list)  # run before, on the same aggregator
    batch_free: Callable[[nn.Module], Tensor] | None = None  # a term of the losses without rows
    around: Callable[[], AbstractContextManager[object]] = nullcontext  # forwards run inside
    compiler: str | None = None
    is_traced: bool = False  # what is compiled is to run as a graph, not eagerly
    scalar: bool = False  # loss.backward() on a mean, instead of opt.backward(losses)
    shared: bool = False
    tolerance: float | None = None


def inputs_of(layer: Layer, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return values [*shape, D], or ids [*shape] with some padding."""
    if layer.takes == "ids":
        return torch.randint(0, NUM_ITEMS + 1, shape)
    return torch.randn(*shape, D, dtype=dtype)


def step_of(
    x: Tensor, ids: tuple[int, ...] = UNSORTED, *, events: bool = False, **options: Any
) -> Step:
    """A batch [B, L, ...] with one loss a user, or one an event."""
    strata = torch.tensor(ids)
    rows = strata.repeat_interleave(x.shape[1]) if events else strata

    def losses(model: nn.Module) -> Tensor:
        scores: Tensor = model(x)
        return scores if events else scores.sum(1)

    return Step(strata, losses, rows, options=options)


Situation = Any  # Callable[[Layer, torch.dtype], Cell]


def strata_situation(ids: tuple[int, ...], num_strata: int) -> Situation:
    def make(layer: Layer, dtype: torch.dtype) -> Cell:
        x = inputs_of(layer, dtype, len(ids), L)
        return Cell(models.Net(layer).to(dtype), [step_of(x, ids)], num_strata)

    return make


def model_situation(make_model: Callable[[Layer], nn.Module]) -> Situation:
    def make(layer: Layer, dtype: torch.dtype) -> Cell:
        x = inputs_of(layer, dtype, B, L)
        return Cell(make_model(layer).to(dtype), [step_of(x)])

    return make


def ragged(layer: Layer, dtype: torch.dtype) -> Cell:
    """Rows are the T events of all users, users first."""
    lengths = torch.tensor(LENGTHS)
    values = inputs_of(layer, dtype, sum(LENGTHS))
    strata = torch.tensor(UNSORTED)
    extra = []
    if layer is LAYERS["position added"]:
        extra = [torch.cat([torch.arange(n) for n in LENGTHS])]
    step = Step(
        strata,
        lambda model: model(values, *extra),
        strata.repeat_interleave(lengths),
        options={"lengths": lengths},
    )
    return Cell(models.Net(layer).to(dtype), [step])


def time_major(layer: Layer, dtype: torch.dtype) -> Cell:
    """The batch comes as [L, B, ...]: only the sizes tell."""
    x = inputs_of(layer, dtype, L, B)
    strata = torch.tensor(UNSORTED)
    step = Step(strata, lambda model: model(x).sum(1), strata)
    return Cell(models.Net(layer, time_major=True).to(dtype), [step])


def length_equals_batch(layer: Layer, dtype: torch.dtype) -> Cell:
    """Training met L != B before: the proven role is kept."""
    before = step_of(inputs_of(layer, dtype, B, L))
    now = step_of(inputs_of(layer, dtype, B, B))
    return Cell(models.Net(layer).to(dtype), [now], history=[before])


def length_equals_batch_at_once(layer: Layer, dtype: torch.dtype) -> Cell:
    """The first batch has L == B: decided by the layer's own layout, or refused."""
    return Cell(models.Net(layer).to(dtype), [step_of(inputs_of(layer, dtype, B, B))])


def in_batch(shared: bool) -> Situation:
    def make(layer: Layer, dtype: torch.dtype) -> Cell:
        users, items = torch.randn(B, 3, dtype=dtype), inputs_of(layer, dtype, B)
        strata = torch.tensor(UNSORTED)
        step = Step(strata, lambda model: model(users, items), strata)
        return Cell(models.InBatch(layer).to(dtype), [step], shared=shared)

    return make


def dropout(layer: Layer, dtype: torch.dtype) -> Cell:
    """One seed before each forward: the library draws what a plain forward draws."""

    def seeded() -> AbstractContextManager[object]:
        torch.manual_seed(5)
        return nullcontext()

    x = inputs_of(layer, dtype, B, L)
    return Cell(models.Dropped(layer, dropout=0.3).to(dtype), [step_of(x)], around=seeded)


def bf16_autocast(layer: Layer, dtype: torch.dtype) -> Cell:
    """Parameters in float32, forward under autocast; compared with plain autocast."""
    x = inputs_of(layer, torch.float32, B, L)
    return Cell(
        models.Net(layer).float(),
        [step_of(x)],
        around=lambda: torch.autocast("cpu", torch.bfloat16),
        tolerance=layer.bf16,
    )


def accumulation(layer: Layer, dtype: torch.dtype) -> Cell:
    """Two micro-batches, different users, before one step."""
    steps = [
        step_of(inputs_of(layer, dtype, B, L)),
        step_of(inputs_of(layer, dtype, B, L + 2), (1, 1, 2, 0, 1, 2)),
    ]
    return Cell(models.Net(layer).to(dtype), steps)


def frozen(layer: Layer, dtype: torch.dtype) -> Cell:
    """The layer's first parameter does not train; the optimizer holds it all the same."""
    net = models.Net(layer).to(dtype)
    next(net.layer.parameters()).requires_grad_(False)
    return Cell(net, [step_of(inputs_of(layer, dtype, B, L))])


def unused(layer: Layer, dtype: torch.dtype) -> Cell:
    """A branch met in the batch before and not in this one."""
    x = inputs_of(layer, dtype, B, L)
    strata = torch.tensor(UNSORTED)
    before = Step(strata, lambda model: model(x, x).sum(1), strata)
    return Cell(models.Extra(layer).to(dtype), [step_of(x)], history=[before])


def l2_of(model: nn.Module) -> Tensor:
    """The L2 term, but for sparse tables: their optimizer takes no dense gradient."""
    total = next(model.parameters()).new_zeros(())
    for module in model.modules():
        if not getattr(module, "sparse", False):
            for p in module.parameters(recurse=False):
                total = total + p.pow(2).sum()
    return LAMBDA * total


def l2_in_the_loss(layer: Layer, dtype: torch.dtype) -> Cell:
    """The term is added to every user's loss; it has no rows, so it counts once."""
    step = step_of(inputs_of(layer, dtype, B, L))
    data = step.losses
    step.losses = lambda model: data(model) + l2_of(model)
    return Cell(models.Net(layer).to(dtype), [step], batch_free=l2_of)


def masked(layer: Layer, dtype: torch.dtype) -> Cell:
    """Losses [B, L] with weights: some events are padding, some count half."""
    step = step_of(inputs_of(layer, dtype, B, L), events=True)
    step.weights = (torch.rand(B, L) > 0.3).to(dtype) * torch.tensor([1, 1, 0.5, 1, 2]).to(dtype)
    return Cell(models.Net(layer).to(dtype), [step])


def compiled(compiler: str) -> Situation:
    def make(layer: Layer, dtype: torch.dtype) -> Cell:
        step = step_of(inputs_of(layer, dtype, B, L))
        model = models.Net(layer).to(dtype)
        return Cell(model, [step], compiler=compiler, is_traced=layer.traced)

    return make


def scalar_backward(layer: Layer, dtype: torch.dtype) -> Cell:
    """An untouched loop: ``loss.backward()`` on the mean, told by ``reduction=``."""
    cell = strata_situation(UNSORTED, 3)(layer, dtype)
    cell.scalar = True
    cell.steps[0].options["reduction"] = "mean"
    return cell  # type: ignore[no-any-return]


SITUATIONS: dict[str, Situation] = {
    "unsorted strata": strata_situation(UNSORTED, 3),
    "empty stratum": strata_situation((3, 0, 1, 1, 0, 3), 4),
    "one-row stratum": strata_situation((2, 0, 0, 1, 0, 2), 3),
    "ragged rows": ragged,
    "time-major": time_major,
    "LayerNorm on [L, B, d]": model_situation(models.NormOnTimeMajor),
    "L == B after L != B": length_equals_batch,
    "L == B at once": length_equals_batch_at_once,
    "in-batch negatives": in_batch(shared=False),
    "in-batch negatives, shared()": in_batch(shared=True),
    "BatchNorm": model_situation(models.BatchNormed),
    "dropout": dropout,
    "bf16 autocast": bf16_autocast,
    "compile (aot_eager)": compiled("aot_eager"),
    "compile (inductor)": compiled("inductor"),
    "checkpointing": model_situation(models.Checkpointed),
    "accumulation": accumulation,
    "parameter used twice": model_situation(models.Twice),
    "frozen parameter": frozen,
    "unused parameter": unused,
    "L2 term": l2_in_the_loss,
    "masked events": masked,
    "loss.backward()": scalar_backward,
}

REFUSED: dict[str, type[Exception]] = {
    "in-batch negatives": StratumLeakError,
    "BatchNorm": BoundaryError,
}
"""Cells that must raise: the loss of one user sees other users."""

MAY_REFUSE: dict[str, type[Exception]] = {"L == B at once": RowLayoutError}
"""Cells that are exact, or say that the layout is undecided; never silently wrong."""

_TIED = ("tied .T", "tied .t()", "tied F.linear")
_SEQUENCE = tuple(name for name, layer in LAYERS.items() if layer.sequence)
_ITEM_SIDE = "the item side holds one item a user, no sequence and no positions"
_CATALOGUE = "scores the whole catalogue: no in-batch negatives"


def _runs_bf16_lstm() -> bool:
    """Return whether torch alone runs an LSTM under autocast: oneDNN needs AVX-512 for it."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(D, D)(torch.zeros(L, B, D))
    except RuntimeError:
        return False
    return True


NOT_APPLICABLE: dict[tuple[str, str], str] = {
    **{("ragged rows", name): "needs padded sequences" for name in _SEQUENCE},
    **{
        (situation, name): reason
        for situation in ("in-batch negatives", "in-batch negatives, shared()")
        for names, reason in (((*_SEQUENCE, "position added"), _ITEM_SIDE), (_TIED, _CATALOGUE))
        for name in names
    },
    **{("BatchNorm", name): "logits are not batch-normed" for name in _TIED},
    **(
        {}
        if _runs_bf16_lstm()
        else {("bf16 autocast", "LSTM"): "torch has none for this processor"}
    ),
}
