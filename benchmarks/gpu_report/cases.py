"""Inputs of every op, for checks and for timings, and what torch offers in its place."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pinet_fast import kernels
from pinet_fast.kernels.routed_linear import cost as routed_cost
from pinet_fast.kernels.stratified_embedding import cost as embedding_cost
from pinet_fast.kernels.stratified_norm import cost as norm_cost
from pinet_fast.kernels.stratum_combine import cost as combine_cost
from pinet_fast.kernels.stratum_gram import cost as gram_cost
from pinet_fast.kernels.stratum_solve import cost as solve_cost
from pinet_fast.kernels.stratum_sums import cost as sums_cost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu_report.setting import Setting

Arguments = tuple[Any, ...]

NUM_STRATA = 8
_TOLERANCE = {"ieee": 2e-5, "tf32": 4e-3, "tf32x3": 2e-5}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: Name of the function in ``pinet_fast.kernels``.
        label: Sizes and dtype, for people.
        make: Returns positional arguments from a seed.
        cost: Floating-point operations and bytes that the op cannot avoid.
        tolerance: Error allowed relative to the largest magnitude of the reference's result.
        options: Keyword arguments.
        baselines: What torch has for the same or nearly the same, by name; takes the arguments.
        uses_tf32: Whether its products, and its baselines', are of tensor cores in tf32.
    """

    op: str
    label: str
    make: Callable[[int], Arguments]
    cost: tuple[int, int]
    tolerance: float
    options: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, Callable[..., object]] = field(default_factory=dict)
    uses_tf32: bool = False

    def run(self, arguments: Arguments, backend: str) -> list[torch.Tensor]:
        """Return the results as a flat list; of ops that change an argument, that argument."""
        result = getattr(kernels, self.op)(*arguments, backend=backend, **self.options)
        if result is None:
            result = arguments[2] if self.op == "stratum_combine" else arguments[0]
        results = result if isinstance(result, list | tuple) else [result]
        return [x for x in results if x is not None]

    def run_on_copies(self, arguments: Arguments, backend: str) -> list[torch.Tensor]:
        """Do so without changing an argument; what is only written is poisoned first."""
        first, *others = arguments
        if self.op == "stratified_embedding_add":
            first = first.clone()
        if self.op == "stratum_combine":
            others[1] = [torch.full_like(out, torch.nan) for out in others[1]]
        return self.run((first, *others), backend)


class Maker:
    """Makes tensors of a setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = setting.device

    def normal(self, seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def strata(self, count: int, seed: int, is_sorted: bool) -> tuple[Any, ...]:
        """Return ids, offsets and order: sizes halve, the last has one row, the one before none."""
        sizes = [count >> (s + 1) for s in range(NUM_STRATA)]
        sizes[-2:] = 0, 1
        sizes[0] += count - sum(sizes)
        ids = torch.arange(NUM_STRATA).repeat_interleave(torch.tensor(sizes))
        offsets = (0, *torch.tensor(sizes).cumsum(0).tolist())
        order = None
        if not is_sorted:
            ids = ids[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
            order = ids.argsort(stable=True).to(self.device)
        return ids.to(self.device), offsets, order

    def items(self, count: int, num_items: int, seed: int) -> torch.Tensor:
        """Return item ids with the popularity of Zipf's law, nearly: log-uniform."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        return (num_items**uniform).long().clamp_(1, num_items - 1).to(self.device)


def every_case(setting: Setting) -> Iterator[Case]:
    """Yield what is checked and timed: sizes of recommenders, skewed strata."""
    make = Maker(setting)
    half, single = torch.bfloat16, torch.float32
    for count in setting.pick((8192, 65536), (70,)):
        for width in setting.pick((64, 256, 1024), (32, 33)):
            yield linear_case(make, count, width, half, "ieee", True)
            yield linear_case(make, count, width, single, "tf32", True)
    count, width = setting.pick((65536, 256), (70, 16))
    yield linear_case(make, count, width, half, "ieee", False)
    for precision in ("ieee", "tf32x3"):
        yield linear_case(make, count, width, single, precision, True)
    for precision in ("tf32", "tf32x3"):
        yield routed_case(make, count, width, single, precision, True)
    for dtype in (half, single):
        yield routed_case(make, count, width, dtype, "ieee", True)
        yield routed_case(make, count, width, dtype, "ieee", False)
        yield norm_case(make, count, setting.pick(256, 20), dtype)
        yield sums_case(make, count, width, dtype)
    yield norm_case(make, setting.pick(8192, 9), setting.pick(2048, 70), single)
    for width in setting.pick((64, 128), (5,)):
        yield from embedding_cases(make, *setting.pick((1 << 20, 50_000), (90, 20)), width, single)
    yield from embedding_cases(make, *setting.pick((19_200, 3_417), (300, 3)), 64, single)
    for strata in (2, 8):
        yield from parameter_cases(make, strata, setting.pick(10_000_000, 500))
    for rule in ("agreement", "balanced", "mgda"):
        yield solve_case(make, rule)


def name_of(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def linear_case(
    make: Maker, count: int, width: int, dtype: torch.dtype, precision: str, is_sorted: bool
) -> Case:
    """Return the gradients of weight and bias by stratum.

    That of the rows is torch's own product and left out, in the cost as well.
    """

    def arguments(seed: int) -> Arguments:
        grad = make.normal(3 * seed, count, width, dtype=dtype)
        rows = make.normal(3 * seed + 1, count, width, dtype=dtype)
        return grad, rows, None, *make.strata(count, seed, is_sorted)

    def dense(grad: Any, rows: Any, *_: Any) -> object:
        return torch.mm(grad.t(), rows)

    def one_by_one(grad: Any, rows: Any, weight: Any, ids: Any, offsets: Any, order: Any) -> object:
        if order is not None:
            grad, rows = grad[order], rows[order]
        spans = itertools.pairwise(offsets)
        return torch.stack([torch.mm(grad[a:b].t(), rows[a:b]) for a, b in spans])

    ends = torch.tensor(make.strata(count, 0, True)[1][1:], dtype=torch.int32, device=make.device)

    def grouped(grad: Any, rows: Any, *_: Any) -> object:
        return F.grouped_mm(grad.t(), rows, offs=ends)

    baselines = {"cuBLAS wgrad": dense, "cuBLAS, S calls": one_by_one}
    if dtype is torch.bfloat16 and is_sorted and width % 8 == 0:
        baselines["F.grouped_mm"] = grouped
    flop = 2 * count * width * width + count * width
    size = 2 * count * width * dtype.itemsize + NUM_STRATA * width * (width + 1) * 4
    label = f"N={count} D={width} {name_of(dtype)}"
    label += f" {precision}" if dtype is torch.float32 else ""
    return Case(
        "stratified_linear_backward", label + ("" if is_sorted else " unsorted"), arguments,
        (flop, size), _TOLERANCE[precision], {"precision": precision, "need_rows": False},
        baselines, uses_tf32=precision != "ieee",
    )  # fmt: skip


def routed_case(
    make: Maker, count: int, width: int, dtype: torch.dtype, precision: str, is_sorted: bool
) -> Case:
    """Return the forward of plugin heads."""

    def arguments(seed: int) -> Arguments:
        rows = make.normal(seed, count, width, dtype=dtype)
        weight = make.normal(seed + 100, NUM_STRATA, width, width, dtype=dtype)
        bias = make.normal(seed + 200, NUM_STRATA, width, dtype=dtype)
        return rows, weight, bias, *make.strata(count, seed, is_sorted)

    def one_layer(rows: Any, weight: Any, bias: Any, *_: Any) -> object:
        return F.linear(rows, weight[0], bias[0])

    label = f"N={count} D={width} {name_of(dtype)}"
    label += f" {precision}" if dtype is torch.float32 else ""
    cost = routed_cost(count, width, width, NUM_STRATA, dtype.itemsize)
    tolerance = _TOLERANCE[precision] if dtype is torch.float32 else 2e-2
    return Case(
        "routed_linear", label + ("" if is_sorted else " unsorted"), arguments, cost, tolerance,
        {"precision": precision}, {"one F.linear": one_layer}, uses_tf32=precision != "ieee",
    )  # fmt: skip


def norm_case(make: Maker, count: int, width: int, dtype: torch.dtype) -> Case:
    """Return the backward of LayerNorm."""

    def arguments(seed: int) -> Arguments:
        grad = make.normal(3 * seed, count, width, dtype=dtype)
        rows = make.normal(3 * seed + 1, count, width, dtype=dtype)
        weight = make.normal(7, width, dtype=dtype)
        _, mean, rstd = torch.native_layer_norm(rows, [width], weight, weight, 1e-5)
        ids = make.strata(count, seed, True)[0]
        return grad, rows, mean.flatten(), rstd.flatten(), weight, ids, NUM_STRATA

    def plain(grad: Any, rows: Any, mean: Any, rstd: Any, weight: Any, *_: Any) -> object:
        statistics = (mean.unsqueeze(1), rstd.unsqueeze(1))
        return torch.ops.aten.native_layer_norm_backward(
            grad, rows, [width], *statistics, weight, weight, [True] * 3
        )

    cost = norm_cost(count, width, NUM_STRATA, dtype.itemsize)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    return Case(
        "stratified_norm_backward", f"N={count} D={width} {name_of(dtype)}", arguments, cost,
        tolerance, {}, {"native_layer_norm_backward": plain},
    )  # fmt: skip


def sums_case(make: Maker, count: int, width: int, dtype: torch.dtype) -> Case:
    """Return the sums of rows by stratum."""

    def arguments(seed: int) -> Arguments:
        ids = make.strata(count, seed, True)[0]
        return make.normal(seed, count, width, dtype=dtype), ids, NUM_STRATA

    cost = sums_cost(count, width, NUM_STRATA, dtype.itemsize)
    return Case(
        "stratum_sums", f"N={count} D={width} {name_of(dtype)}", arguments, cost, 1e-5, {},
        {"rows.sum(0)": lambda rows, *_: rows.sum(0)},
    )  # fmt: skip


def embedding_cases(
    make: Maker, count: int, num_items: int, width: int, dtype: torch.dtype
) -> Iterator[Case]:
    """Yield both ops of lookups, of three lists as SASRec has with one negative."""
    parts = [count // 3] * 3

    def lists(seed: int) -> Arguments:
        ids = [make.items(n, num_items, seed + k) for k, n in enumerate(parts)]
        strata = [make.strata(n, seed, True)[0] for n in parts]
        grads = [make.normal(seed + k, n, width, dtype=dtype) for k, n in enumerate(parts)]
        return ids, strata, grads

    def dense(seed: int) -> Arguments:
        return make.normal(seed, NUM_STRATA, num_items, width, dtype=dtype), *lists(seed)

    def backward(ids: Any, strata: Any, grads: Any, *_: Any) -> object:
        return [
            torch.ops.aten.embedding_dense_backward(g, i, num_items, -1, False)
            for g, i in zip(grads, ids, strict=True)
        ]

    touched = int(torch.cat(lists(0)[0]).unique().numel())
    label = f"N={3 * parts[0]} V={num_items} D={width} {name_of(dtype)}"
    cost = embedding_cost(3 * parts[0], touched, NUM_STRATA, width, dtype.itemsize)
    yield Case(
        "stratified_embedding_reduce", label, lambda seed: (*lists(seed), NUM_STRATA, num_items),
        cost, 1e-5, {}, {"embedding_dense_backward x 3": backward},
    )  # fmt: skip
    cells = NUM_STRATA * touched * width * dtype.itemsize
    size = 3 * parts[0] * (16 + width * dtype.itemsize) + 2 * cells
    yield Case("stratified_embedding_add", label, dense, (3 * parts[0] * width, size), 1e-5)


def parameter_cases(make: Maker, strata: int, size: int) -> Iterator[Case]:
    """Yield Gram and combination of the stratum gradients of a model."""
    shapes = [(size // 2,), (size // 4, 2), (64,), (17, 3)]

    def grads(seed: int) -> list[torch.Tensor]:
        return [make.normal(seed + k, strata, *shape) for k, shape in enumerate(shapes)]

    def combining(seed: int) -> Arguments:
        weights = make.normal(seed, strata).double()
        return grads(seed), weights, [make.normal(seed + 50, *shape) for shape in shapes]

    def products(found: Any, *_: Any) -> object:
        return [x.flatten(1) @ x.flatten(1).t() for x in found]

    def tensordots(found: Any, weights: Any, *_: Any) -> object:
        return [torch.tensordot(weights.float(), x, 1) for x in found]

    full = [(strata, *shape) for shape in shapes]
    label = f"S={strata} {size} numbers float32"
    yield Case(
        "stratum_gram", label, lambda seed: (grads(seed),), gram_cost(full, 4), 1e-6, {},
        {"matmul": products},
    )  # fmt: skip
    yield Case(
        "stratum_combine", label, combining, combine_cost(full, 4), 1e-6, {},
        {"tensordot": tensordots},
    )  # fmt: skip


def solve_case(make: Maker, rule: str) -> Case:
    """Return the weights of a rule from one Gram."""

    def arguments(seed: int) -> Arguments:
        x = make.normal(seed, NUM_STRATA, 100).double()
        return x @ x.t(), rule

    cost = solve_cost(rule, 1, NUM_STRATA)
    return Case("stratum_solve", f"{rule} S={NUM_STRATA}", arguments, cost, 1e-6)
