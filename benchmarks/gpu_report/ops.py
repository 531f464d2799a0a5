"""Checks and timings of single ops."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_report.cases import Case, every_case
from benchmarks.gpu_report.setting import median_seconds, poisoned_outputs, rotated
from pinet_fast.kernels import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu_report.setting import Setting

Row = dict[str, Any]


@contextmanager
def tf32(is_on: bool) -> Iterator[None]:
    """Let torch's products of float32 use tf32, or not; the report's own process alone."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = is_on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def over_cases(
    setting: Setting, act: Callable[[Case, Setting], Row], row: Callable[[Row], None]
) -> None:
    """Act on every case while there is time; a case that fails is a row with its error."""
    for case in every_case(setting):
        head = {"op": case.op, "case": case.label}
        if not setting.has_time():
            row({**head, "status": "left out: no time"})
            continue
        try:
            with torch.no_grad(), tf32(case.uses_tf32):
                row({**head, "status": "ok", **act(case, setting)})
        except Exception as error:
            row({**head, "status": f"failed: {type(error).__name__}: {error}"[:500]})


def check(case: Case, setting: Setting) -> Row:
    """Compare with the reference, repeat bit for bit, and look for elements left out."""
    arguments = case.make(0)
    with tf32(False):
        expected = case.run_on_copies(arguments, "reference")
    found = case.run_on_copies(arguments, setting.backend)
    errors = [_relative(a, b) for a, b in zip(found, expected, strict=True)]
    with poisoned_outputs():
        poisoned = case.run_on_copies(arguments, setting.backend)
    num_nan = sum(int(x.isnan().sum()) for x in poisoned if x.is_floating_point())
    equal = 0
    for _ in range(setting.repeats):
        again = case.run_on_copies(arguments, setting.backend)
        equal += all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    row: Row = {"error": max(errors), "allowed": case.tolerance}
    row |= {"equal": equal, "repeats": setting.repeats, "left_unwritten": num_nan}
    if not max(errors) <= case.tolerance or equal < setting.repeats or num_nan:
        row["status"] = "wrong"
    return row


def time_op(case: Case, setting: Setting) -> Row:
    """Time an op, what torch has in its place, and the floor under both."""
    inputs = rotated(case.make, setting)
    # Ops that change an argument change it again: what they add to is of no matter to time.
    ours = median_seconds(lambda *x: case.run(x, setting.backend), inputs, setting)
    row: Row = {"seconds": ours["device"], "host_seconds": ours["host"]}
    row["flop"], row["bytes"] = case.cost
    for name, baseline in case.baselines.items():
        try:
            row.setdefault("baselines", {})[name] = median_seconds(baseline, inputs, setting)
        except Exception as error:  # F.grouped_mm takes few shapes and dtypes
            row.setdefault("refused", {})[name] = f"{type(error).__name__}: {error}"[:200]
    return row


def backends(setting: Setting, row: Callable[[Row], None]) -> None:
    """Say for one case of every op which backends can serve it."""
    seen: set[str] = set()
    for case in every_case(setting):
        if case.op not in seen:
            seen.add(case.op)
            row({"op": case.op, "case": case.label, "explain": explain(case.op, case.make(0))})


def limits(setting: Setting, row: Callable[[Row], None]) -> None:
    """Measure what bounds every kernel: bytes copied per second, products per second."""
    count = setting.pick(1 << 28, 1 << 16)  # 1 GiB
    x, y = (torch.empty(count, device=setting.device).fill_(1.0) for _ in range(2))
    seconds = median_seconds(lambda a, b: a.copy_(b), [(x, y), (y, x)], setting)["device"]
    row({"what": "copy", "bytes_per_second": 8 * count / seconds})
    size = setting.pick(8192, 64)
    for name, dtype, is_tf32 in (
        ("bfloat16", torch.bfloat16, False), ("float32 tf32", torch.float32, True),
        ("float32 ieee", torch.float32, False),
    ):  # fmt: skip
        a = torch.randn(size, size, device=setting.device).to(dtype)
        with tf32(is_tf32):
            seconds = median_seconds(torch.mm, [(a, a), (a, a.clone())], setting)["device"]
        row({"what": f"products in {name}", "flop_per_second": 2 * size**3 / seconds})


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    scale = max(float(expected.double().abs().max()), 1e-30)
    return float((found.double() - expected.double()).abs().max()) / scale
