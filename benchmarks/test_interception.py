"""What the interception costs a call, and a step its memory."""

from __future__ import annotations

import subprocess
import sys
import time
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
import sys, torch
sys.path.insert(0, {root!r})
from benchmarks.test_interception import peak_of
print(peak_of({rule!r}))
"""


def peak_of(rule: str) -> int:
    """Return how many bytes three steps need above what the model and its optimizer hold."""
    from benchmarks import test_step
    from pinet_fast import SASRec

    torch.manual_seed(0)
    batch = test_step.full_batch(4)
    model = SASRec(50_000, max_len=test_step.LENGTH, loss="bce", dropout=0.2)
    adam = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()  # its state is there before
    adam.zero_grad()
    opt = GradientAggregator(adam, rule)
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    for _ in range(3):
        opt.zero_grad()
        with opt.stratify(batch.strata):
            losses = model(batch)
        opt.backward(losses)
        opt.step()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def test_peak_of_tensors_of_a_step(benchmark: Any) -> None:
    """The same by tensors alone, which no allocator's habits change: one step, after the proof."""
    from benchmarks import test_step
    from pinet_fast import SASRec

    benchmark.group = "memory"

    def peak(rule: str) -> int:
        torch.manual_seed(0)
        batch = test_step.full_batch(4)
        model = SASRec(50_000, max_len=test_step.LENGTH, loss="bce", dropout=0.2)
        opt = GradientAggregator(torch.optim.Adam(model.parameters()), rule)

        def step() -> None:
            opt.zero_grad()
            with opt.stratify(batch.strata):
                losses = model(batch)
            opt.backward(losses)
            opt.step()

        for _ in range(4):
            step()
        return peak_bytes(step)

    plain, aggregated = peak("joint"), peak("agreement")
    benchmark.extra_info.update(plain_bytes=plain, ratio=aggregated / plain)
    benchmark.pedantic(lambda: None, rounds=1)
    assert 0 < aggregated < 1.2 * plain


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_of_a_step(benchmark: Any, capsys: Any) -> None:
    """V = 50,000, S = 4: an aggregated step beside one of a constant rule, which is a plain one."""
    from pathlib import Path

    benchmark.group = "memory"
    root = str(Path(__file__).resolve().parents[1])

    def peak(rule: str) -> int:
        code = PEAK.format(root=root, rule=rule)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    plain, aggregated = peak("joint"), peak("agreement")
    benchmark.extra_info.update(plain_bytes=plain, ratio=aggregated / plain)
    benchmark.pedantic(lambda: None, rounds=1)
    with capsys.disabled():
        print(f"\npeak memory: {aggregated / plain:.2f} ({plain / 2**20:.0f} MiB plain)")
    assert aggregated > 0
