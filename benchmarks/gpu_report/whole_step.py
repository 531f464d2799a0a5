"""A whole aggregated step: against plain autograd, and against a plain step in time."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_report.models import Batch, NextItem, Size, make_batch, make_model
from pinet_fast import GradientAggregator
from pinet_fast.kernels import _registry, stratum_solve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu_report.setting import Setting

Row = dict[str, Any]

OPS = (
    "stratified_linear_backward", "stratified_norm_backward", "stratum_gram", "stratum_solve",
    "stratum_combine",
)  # fmt: skip
OPS_OF_LOSS = {
    "bce": ("stratified_embedding_reduce",),
    "ce": ("stratified_embedding_add", "stratum_sums"),  # a dense table, and a gate
}
TINY = Size(users=9, length=5, dim=8, items=20, blocks=1)


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Let one backend serve every op, or nothing."""
    before = os.environ.get("PINET_FAST_BACKEND")
    os.environ["PINET_FAST_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["PINET_FAST_BACKEND"]
        else:
            os.environ["PINET_FAST_BACKEND"] = before


def stratum_gradients(model: NextItem, batch: Batch, num_strata: int) -> list[torch.Tensor]:
    """Return [S, *shape] a parameter, by one autograd pass a stratum and nothing of the library."""
    losses = model(batch.ids, batch.targets, batch.negatives)
    parameters = list(model.parameters())
    found = []
    for s in range(num_strata):
        mean = losses[batch.strata == s].mean()
        found.append(torch.autograd.grad(mean, parameters, retain_graph=True))
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def check_against_autograd(
    loss: str, rule: str, size: Size, num_strata: int, setting: Setting
) -> Row:
    """Run one whole step with the backend forced; return errors and calls of every op."""
    model = make_model(size, loss, setting)
    batch = make_batch(size, num_strata, setting, seed=1)
    ops = (*OPS, *OPS_OF_LOSS[loss])
    before = {op: _registry.num_calls(op, setting.backend) for op in ops}
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.0), rule)
    with forced(setting.backend):
        step(model, opt, batch, num_strata)
    calls = {op: _registry.num_calls(op, setting.backend) - before[op] for op in ops}
    expected = stratum_gradients(model, batch, num_strata)
    grams = [torch.einsum("sc,tc->st", *[g.flatten(1).double()] * 2) for g in expected]
    gram = torch.stack(grams)
    gram = gram if rule == "agreement" else gram.sum(0, keepdim=True)
    weights = stratum_solve(gram, rule, backend="reference").expand(len(expected), -1)
    errors = []
    for p, g, w in zip(model.parameters(), expected, weights, strict=True):
        assert p.grad is not None
        combined = torch.einsum("s,sc->c", w, g.flatten(1).double()).view_as(p)
        scale = max(float(g.abs().max()), 1e-2 * max(float(x.abs().max()) for x in expected))
        errors.append(float((p.grad.double() - combined).abs().max()) / scale)
    row: Row = {"model": loss, "rule": rule, "S": num_strata, "error": max(errors), "calls": calls}
    # Weights by agreement are exponentials of cosines: errors of gradients grow a little.
    row["allowed"] = 1e-3
    fine = max(errors) <= row["allowed"] and min(calls.values()) > 0
    return {**row, "status": "ok" if fine else "wrong"}


def step(model: NextItem, opt: GradientAggregator, batch: Batch, num_strata: int) -> None:
    """Take one aggregated step."""
    opt.zero_grad()
    with opt.stratify(batch.strata, num_strata=num_strata):
        losses = model(batch.ids, batch.targets, batch.negatives)
    opt.backward(losses)
    opt.step()


def correctness(setting: Setting, row: Callable[[Row], None]) -> None:
    """Compare whole steps of both models with plain autograd."""
    size = setting.pick(Size(users=64, length=50, dim=64, items=3417), TINY)
    for loss in ("bce", "ce"):
        for rule in ("agreement", "balanced", "mgda"):
            row(check_against_autograd(loss, rule, size, 3, setting))


def timings(setting: Setting, row: Callable[[Row], None]) -> None:
    """Time steps, Adam included, in interleaved pairs with a plain step."""
    usual = Size(users=128, length=50, dim=64, items=3417)
    large = Size(users=1024, length=200, dim=256, items=50_000)
    runs = [(usual, "bce", s, False) for s in (4, 8)] + [(usual, "ce", 4, False)]
    runs += [(large, "bce", 4, True)]
    for size, loss, num_strata, half in setting.pick(runs, [(TINY, "bce", 3, False)]):
        candidates = {rule: _aggregated(rule) for rule in ("agreement", "balanced", "mgda")}
        if size is not large:
            candidates |= {"S micro-batches": _micro_batches, "S retained backwards": _retained}
        for name, make in candidates.items():
            head = {"model": loss, "S": num_strata, "step": name, "autocast": half}
            head |= {"users": size.users, "length": size.length, "dim": size.dim}
            if not setting.has_time():
                row({**head, "status": "left out: no time"})
                continue
            row({**head, **_pairs(make, size, loss, num_strata, half, setting)})


def _pairs(
    make: Callable[[NextItem, int], Callable[[Batch], None]],
    size: Size, loss: str, num_strata: int, half: bool, setting: Setting,
) -> Row:  # fmt: skip
    """Alternate a plain step and another; return the median ratio and medians of both."""
    batches = [make_batch(size, num_strata, setting, seed) for seed in range(4)]
    plain = _plain(make_model(size, loss, setting), num_strata)
    other = make(make_model(size, loss, setting), num_strata)
    cast = torch.autocast(setting.device.type, torch.bfloat16, enabled=half)

    def seconds(run: Callable[[Batch], None], batch: Batch) -> float:
        setting.wait()
        start = time.perf_counter()
        with cast:
            run(batch)
        setting.wait()
        return time.perf_counter() - start

    with forced(setting.backend):
        for i in range(setting.pick(6, 2)):  # leak checks and compilations
            seconds(other, batches[i % 4])
            seconds(plain, batches[i % 4])
        pairs = []
        for i in range(setting.pick(30, 2)):
            order = (plain, other) if i % 2 else (other, plain)
            taken = {run: seconds(run, batches[i % 4]) for run in order}
            pairs.append((taken[other], taken[plain]))
    ratios = sorted(a / b for a, b in pairs)
    return {
        "status": "ok",
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "seconds": statistics.median(a for a, _ in pairs),
        "plain_seconds": statistics.median(b for _, b in pairs),
    }


def _adam(model: NextItem) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-4)


def _plain(model: NextItem, num_strata: int) -> Callable[[Batch], None]:
    opt = _adam(model)

    def run(batch: Batch) -> None:
        opt.zero_grad()
        model(batch.ids, batch.targets, batch.negatives).mean().backward()
        opt.step()

    return run


def _aggregated(rule: str) -> Callable[[NextItem, int], Callable[[Batch], None]]:
    def make(model: NextItem, num_strata: int) -> Callable[[Batch], None]:
        opt = GradientAggregator(_adam(model), rule)
        return lambda batch: step(model, opt, batch, num_strata)

    return make


def _mean_of(model: NextItem, opt: torch.optim.Optimizer, grads: list[Any]) -> None:
    """Give every parameter the mean of its stratum gradients: the least a rule can do."""
    for p, *parts in zip(model.parameters(), *grads, strict=True):
        p.grad = torch.stack(parts).mean(0)
    opt.step()


def _micro_batches(model: NextItem, num_strata: int) -> Callable[[Batch], None]:
    """Return a step on S parts of equal size, which is what strata cost at best."""
    opt = _adam(model)

    def run(batch: Batch) -> None:
        grads = []
        for s in range(num_strata):
            users = torch.arange(s, len(batch.strata), num_strata, device=batch.strata.device)
            part = batch.of(users)
            losses = model(part.ids, part.targets, part.negatives)
            grads.append(torch.autograd.grad(losses.mean(), list(model.parameters())))
        _mean_of(model, opt, grads)

    return run


def _retained(model: NextItem, num_strata: int) -> Callable[[Batch], None]:
    opt = _adam(model)

    def run(batch: Batch) -> None:
        losses = model(batch.ids, batch.targets, batch.negatives)
        masks = torch.nn.functional.one_hot(batch.strata, num_strata).to(losses.dtype)
        parts = (losses.mean(1) @ masks).unbind()
        grads = [
            torch.autograd.grad(part, list(model.parameters()), retain_graph=True) for part in parts
        ]
        _mean_of(model, opt, grads)

    return run
