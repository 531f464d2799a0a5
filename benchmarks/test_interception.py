"""What the interception costs a call, and a step its memory."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness.memory import peak_bytes
from pinet_fast import GradientAggregator

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = torch.arange(8) // 2
USES = 30


class Calls:
    """Small calls whose arithmetic costs next to nothing."""

    def __init__(self) -> None:
        self.x, self.y, self.ids = torch.randn(8, 8), torch.randn(8, 8), torch.arange(8)
        self.linear, self.norm, self.table = nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(9, 8)
        self.vector = nn.Parameter(torch.randn(8))
        modules = (self.linear, self.norm, self.table)
        self.parameters = [p for m in modules for p in m.parameters()] + [self.vector]
        self.calls: dict[str, Callable[[], torch.Tensor]] = {
            "not rewritten": lambda: torch.add(self.x, self.y),
            "linear": lambda: F.linear(self.x, self.linear.weight, self.linear.bias),
            "layer_norm": lambda: self.norm(self.x),
            "embedding": lambda: F.embedding(self.ids, self.table.weight),
            "add": lambda: self.x + self.vector,
            "mul": lambda: self.x * self.vector,
        }


def seconds(call: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    for _ in range(USES):
        call()
    return (time.perf_counter() - started) / USES


@pytest.mark.parametrize("name", Calls().calls)
def test_extra_time_of_a_call(name: str, benchmark: Any, capsys: Any) -> None:
    """Least of many rounds, plain and intercepted in turn, every use proven before."""
    benchmark.group = "interception"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = Calls()
        call = calls.calls[name]
        opt = GradientAggregator(torch.optim.SGD(calls.parameters, lr=0.1), "agreement")
        for _ in range(2):
            with opt.stratify(IDS):
                losses = calls.calls["linear"]().square().sum(1)
                for _ in range(USES):
                    losses = losses + (call().square() * torch.rand(8)).sum(1)
            opt.backward(losses)
        assert opt.report.leak == "proven"
        plain, inside = [], []
        for _ in range(3 if benchmark.disabled else 100):
            plain.append(seconds(call))
            with opt.stratify(IDS):
                inside.append(seconds(call))
        extra = (min(inside) - min(plain)) * 1e6
        benchmark.extra_info.update(extra_us=extra, plain_us=min(plain) * 1e6)
        benchmark.pedantic(call, rounds=3, iterations=10)
        with capsys.disabled():
            print(f"\n{name}: {extra:.1f} us beside {min(plain) * 1e6:.1f} us")
        assert extra > 0
    finally:
        torch.set_num_threads(threads)


PEAK = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.test_interception import resident_peak
print(resident_peak({rule!r}))
"""
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Has glibc map every tensor of 64 KiB on its own, so that what is freed leaves the process."""

CHILDREN = 5


def step_with_large_table(rule: str) -> Callable[[], None]:
    """Return a step of a model with 50,000 items and S = 4, after the leak check.

    ``"plain"`` has no GradientAggregator; ``"joint"`` is its constant rule, which costs no more.
    """
    from benchmarks import test_step
    from pinet_fast import SASRec

    torch.manual_seed(0)
    batch = test_step.full_batch(4)
    model = SASRec(50_000, max_len=test_step.LENGTH, loss="bce", dropout=0.2)
    adam = torch.optim.Adam(model.parameters())

    def plain() -> None:
        adam.zero_grad()
        model(batch).mean().backward()
        adam.step()

    def aggregated() -> None:
        opt.zero_grad()
        with opt.stratify(batch.strata):
            losses = model(batch)
        opt.backward(losses)
        opt.step()

    step = plain
    if rule != "plain":
        opt = GradientAggregator(adam, rule)
        step = aggregated
    for _ in range(4):
        step()
    adam.zero_grad()
    return step


def resident_peak(rule: str) -> int:
    """Return how many bytes of memory three steps need above what is held between steps."""
    step = step_with_large_table(rule)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is now what is resident
    before = _resident("VmHWM")
    for _ in range(3):
        step()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def test_peak_of_tensors_of_a_step(benchmark: Any) -> None:
    """What torch's allocator is asked for, whatever the system makes of it."""
    benchmark.group = "memory"
    plain, aggregated = (peak_bytes(step_with_large_table(rule)) for rule in ("plain", "agreement"))
    benchmark.extra_info.update(plain_bytes=plain, ratio=aggregated / plain)
    benchmark.pedantic(lambda: None, rounds=1)
    assert 0 < aggregated < 1.2 * plain


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators keep what they like"
)
def test_peak_memory_of_a_step(benchmark: Any, capsys: Any) -> None:
    """Resident memory, in processes of their own whose allocator keeps nothing."""
    benchmark.group = "memory"
    root = str(Path(__file__).resolve().parents[1])

    def peak(rule: str) -> int:
        code = PEAK.format(root=root, rule=rule)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **EXACT}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(done.stdout)

    children = 1 if benchmark.disabled else CHILDREN
    found = {rule: [peak(rule) for _ in range(children)] for rule in ("plain", "agreement")}
    plain, aggregated = (statistics.mean(found[rule]) for rule in ("plain", "agreement"))
    scatter = max((max(peaks) - min(peaks)) / statistics.mean(peaks) for peaks in found.values())
    benchmark.extra_info.update(plain_bytes=plain, ratio=aggregated / plain, scatter=scatter)
    benchmark.pedantic(lambda: None, rounds=1)
    with capsys.disabled():
        print(
            f"\npeak memory: {aggregated / plain:.3f} ({plain / 2**20:.1f} MiB plain, scatter "
            f"{scatter:.2%} of {children})"
        )
    assert 0 < aggregated < 1.2 * plain
