"""The same training with the compiled lane and without it, compared bit for bit."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast import _env
from pinet_fast.aggregation import GradientAggregator, StrataIndex, stratifying
from pinet_fast.aggregation.interception import Interception
from pinet_fast.kernels import _registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


V, D = 20, 6
"""Rows and width of the small models' tables."""

WARM_UP = 3
"""Steps after which the sites of a simple model are settled and its dense leaves known."""


class Small(nn.Module):
    """A table, a norm and a layer."""

    def __init__(self, dim: int = D) -> None:
        super().__init__()
        self.items = nn.Embedding(V, dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, dim)

    def above(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.up(self.norm(x)))

    def forward(self, batch: Batch) -> Tensor:
        return self.above(self.items(batch.ids(V, batch.num_rows)))


class Deeper(Small):
    """With a layer more."""

    def __init__(self, dim: int = D) -> None:
        super().__init__(dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, batch: Batch) -> Tensor:
        return self.down(super().forward(batch))


@dataclass
class Batch:
    """Users of some strata, each with some events, and random inputs of both.

    Attributes:
        strata: The strata of the users.
        lengths: Events of every user; None where there are users only.
        num_strata: S.
        seed: Of the inputs.
    """

    strata: Sequence[int]
    lengths: Sequence[int] | None = None
    num_strata: int = 3
    seed: int = 0

    def index(self) -> StrataIndex:
        lengths = None if self.lengths is None else torch.tensor(list(self.lengths)).long()
        return StrataIndex(torch.tensor(list(self.strata)).long(), self.num_strata, lengths)

    @property
    def num_users(self) -> int:
        return len(self.strata)

    @property
    def num_rows(self) -> int:
        """T, or B where there are no events."""
        return self.num_users if self.lengths is None else sum(self.lengths)

    def users_of_rows(self) -> Tensor:
        """Return the user of every row, int64 [N]."""
        users = torch.arange(self.num_users)
        if self.lengths is None:
            return users
        return users.repeat_interleave(torch.tensor(list(self.lengths)).long())

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32, salt: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def ids(self, high: int, *shape: int, salt: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + salt + 500)
        return torch.randint(high, shape, generator=generator)


def batches(
    count: int, *, num_strata: int = 3, num_users: int = 7, ragged: bool = True
) -> list[Batch]:
    """Return batches of changing sizes whose strata are all there, in no order."""
    made = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        extra = torch.randint(num_strata, (num_users + i % 3,), generator=generator).tolist()
        strata = [*extra, *range(num_strata)]
        lengths = torch.randint(1, 5, (len(strata),), generator=generator).tolist()
        made.append(Batch(strata, lengths if ragged else None, num_strata, seed=i))
    return made


@contextmanager
def lane(on: bool) -> Iterator[None]:
    """Turn the lane on or off inside; ``stratify`` reads it.

    Where something was compiled in this process, by another test say, there is no lane.
    """
    with (
        patch.dict(os.environ, {_env.LANE: "1" if on else "0"}),
        patch.object(stratifying, "is_compiler_used", lambda: False),
    ):
        yield


@contextmanager
def boundaries_in_python() -> Iterator[Counter[str]]:
    """Count the calls inside that reach the boundary rules in Python, by their function's name.

    Looks at an attribute of a parameter, such as its gradient, do not count.

    The lane was handed the interception's ``__torch_function__`` itself, but that one looks the
    method up which is wrapped here.
    """
    seen: Counter[str] = Counter()
    plain = Interception._boundary_or_derived

    def counting(self: Any, func: Any, args: Any, kwargs: Any) -> Any:
        seen[func.__name__] += func.__name__ != "__get__"
        return plain(self, func, args, kwargs)

    Interception._boundary_or_derived = counting  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Interception._boundary_or_derived = plain  # type: ignore[method-assign]


@contextmanager
def calls_of_kernels() -> Iterator[Counter[tuple[str, str]]]:
    """Count the calls of kernels inside from zero, by op and backend; coverage() tells them too."""
    before = _registry._calls
    _registry._calls = Counter()
    try:
        yield _registry._calls
    finally:
        before.update(_registry._calls)
        _registry._calls = before


@dataclass
class Trail:
    """What some steps left: equal bits have equal entries.

    Attributes:
        entries: One a step.
        in_python: Boundary calls that Python decided, by function, one a step.
        optimizer: The aggregator.
        model: The model.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    in_python: list[Counter[str]] = field(default_factory=list)
    optimizer: Any = None
    model: Any = None

    @property
    def num_in_python(self) -> list[int]:
        """Return the boundary calls that Python decided, one number a step."""
        return [seen.total() for seen in self.in_python]


def bits(tensor: Tensor | None) -> Any:
    """Return dtype, shape and bytes, so that -0.0 is not 0.0 and NaN is NaN."""
    if tensor is None:
        return None
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        return "sparse", bits(tensor.indices()), bits(tensor.values())
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def per_row(out: Tensor) -> Tensor:
    """Return one loss a row."""
    return out.sin().flatten(1).sum(1) if out.dim() > 1 else out.sin()


def train(
    make: Callable[[], nn.Module],
    steps: Sequence[Batch],
    *,
    on: bool,
    forward: Callable[[Any, Batch], Tensor],
    rule: Any = "agreement",
    before: Callable[[int, Any, GradientAggregator], None] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    catches: type[Exception] | tuple[type[Exception], ...] = (),
    **options: Any,
) -> Trail:
    """Train a model for some steps, and note what each step did.

    Args:
        make: Makes the model, from the seed that is set here.
        steps: The batches.
        on: Whether the lane is.
        forward: Returns the losses of a batch, one a row.
        rule: The aggregator's.
        before: Called before every step with its number, the model and the aggregator.
        optimizer: Makes the optimizer of the named parameters; None = Adam.
        catches: Errors that a step may raise; it is noted, and the next step goes on.
        options: Further arguments of the aggregator.
    """
    torch.manual_seed(0)
    model = make()
    build = optimizer or (lambda named: torch.optim.Adam(named, lr=0.05))
    opt = GradientAggregator(build(list(model.named_parameters())), rule, **options)
    trail = Trail(optimizer=opt, model=model)
    with lane(on), calls_of_kernels() as calls:
        for i, batch in enumerate(steps):
            if before is not None:
                before(i, model, opt)
            torch.manual_seed(100 + i)
            opt.zero_grad()
            with boundaries_in_python() as seen:
                trail.entries.append(_step(model, opt, batch, forward, catches))
            trail.in_python.append(seen)
            trail.entries[-1]["calls of kernels"] = sorted((op, n) for op, n in calls.items() if n)
    return trail


def _step(
    model: nn.Module,
    opt: GradientAggregator,
    batch: Batch,
    forward: Callable[[Any, Batch], Tensor],
    catches: type[Exception] | tuple[type[Exception], ...],
) -> dict[str, Any]:
    try:
        with opt.stratify(batch.index()):
            losses = forward(model, batch)
        opt.backward(losses)
    except catches as error:
        opt.zero_grad()
        return {"error": (type(error), str(error)), "coverage": str(opt.coverage())}
    report = opt.report
    entry = {
        "losses": bits(losses),
        "gradients": {n: bits(p.grad) for n, p in model.named_parameters()},
        "leak": report.leak,
        "weights": bits(report.weights),
        "gram": bits(report.gram),
        "coverage": str(opt.coverage()),
    }
    opt.step()
    entry["parameters"] = {n: bits(p) for n, p in model.named_parameters()}
    return entry


def assert_same(ours: Trail, theirs: Trail) -> None:
    """All that the steps left is the same, bit for bit."""
    assert len(ours.entries) == len(theirs.entries)
    for i, (a, b) in enumerate(zip(ours.entries, theirs.entries, strict=True)):
        assert a.get("error") == b.get("error"), f"step {i}"
        for key, value in b.items():
            wrong = [n for n in value if a[key][n] != value[n]] if isinstance(value, dict) else []
            assert not wrong, f"step {i}: {key} of {wrong} differ"
            assert a[key] == value, f"step {i}: {key} differ"


def compare(
    make: Callable[[], nn.Module], steps: Sequence[Batch], **options: Any
) -> tuple[Trail, Trail]:
    """Train with the lane and without it, and compare; return both."""
    ours = train(make, steps, on=True, **options)
    theirs = train(make, steps, on=False, **options)
    assert_same(ours, theirs)
    return ours, theirs


def outcome(call: Callable[[], Any]) -> tuple[type[BaseException], str] | None:
    """Return the type and the text of the error that a call raises, or None."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None
