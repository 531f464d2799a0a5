"""Ranges: nothing while off, the right names and nesting while on, in NVTX and torch.profiler."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pinet_fast import (
    GradientAggregator,
    Negatives,
    RaggedLoader,
    Split,
    Strata,
    StratifiedBatchSampler,
    prepare,
    profiling,
)
from pinet_fast.data import simulate_log
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


class Recorder:
    """Stands in for NVTX."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def push(self, entered: profiling.Range) -> None:
        self.calls.append(f"+{entered.category}/{entered.name}")

    def pop(self) -> None:
        self.calls.append("-")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    profiling._show_in(recorder)
    yield recorder
    profiling.disable()


def take_step() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(torch.tensor([0, 1, 1])):
        losses = model(torch.randn(3, 2)).sum(1)
    opt.backward(losses)
    opt.step()


STEP = [
    "+model/forward", "+model/boundary/linear", "-", "-",
    "+backward/backward", "+backward/leak check", "-", "-",
    "+aggregate/gram", "-", "+aggregate/rule", "-", "+aggregate/combine", "-", "+optim/step", "-",
]  # fmt: skip


def test_a_step_is_bracketed(recorder: Recorder) -> None:
    take_step()
    assert recorder.calls == STEP


def test_a_batch_is_bracketed(recorder: Recorder, tmp_path: Path) -> None:
    store = prepare(simulate_log(tmp_path / "log.parquet", users=50, items=100), store_dir=tmp_path)
    split = Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")
    loader = RaggedLoader(
        store, StratifiedBatchSampler(strata, batch_size=50), split=split, strata=strata,
        max_len=5, negatives=Negatives(1),
    )  # fmt: skip
    recorder.calls.clear()
    list(loader)
    assert recorder.calls == [
        "+data/plan/draw", "-", "+data/plan/plan", "-", "+data/gather/gather", "-",
        "+data/negatives/negatives", "-",
    ]  # fmt: skip


def test_every_range_that_is_listed_is_entered_somewhere() -> None:
    from pathlib import Path

    package = Path(profiling.__file__).parent
    text = "".join(p.read_text() for p in package.rglob("*.py") if p.name != "profiling.py")
    named = {name: r for name, r in vars(profiling).items() if isinstance(r, profiling.Range)}
    assert set(named.values()) == set(profiling.PHASES)
    assert [name for name in named if f"with profiling.{name}" not in text] == []


def test_exceptions_pass_and_leave_the_stack_in_order(recorder: Recorder) -> None:
    for is_on in (True, False):
        if not is_on:
            profiling.disable()
        with pytest.raises(ZeroDivisionError), profiling.STEP, profiling.GRAM:
            raise ZeroDivisionError
    assert recorder.calls == ["+optim/step", "+aggregate/gram", "-", "-"]


class Dispatched(TorchDispatchMode):
    """Counts operators that reach the dispatcher."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_off_a_range_costs_less_than_a_tenth_of_a_microsecond_and_dispatches_nothing() -> None:
    assert not profiling.is_enabled()
    with Dispatched() as dispatched:
        for each in profiling.PHASES:
            with each:
                pass
    assert dispatched.count == 0
    cost, limit = _seconds(profiling.STEP), 0.1e-6
    if cost >= limit and (lock := _seconds(threading.Lock())) > limit:
        assert cost < lock
        pytest.skip(f"too slow a machine: the range takes {cost:.2g} s, a bare lock {lock:.2g} s")
    assert cost < limit


def _seconds(context: AbstractContextManager[Any]) -> float:
    """Return CPU time of the best of many: other work on the machine is not the context's."""
    times, loops = 2_000, []
    for _ in range(200):
        started = time.process_time()
        for _ in range(times):
            with context:
                pass
        middle = time.process_time()
        for _ in range(times):
            pass
        loops.append((middle - started) - (time.process_time() - middle))
    return min(loops) / times


def test_torch_profiler_shows_the_ranges_of_every_thread() -> None:
    profiling.enable("torch")
    try:
        with torch.profiler.profile() as profiler:
            thread = threading.Thread(target=take_step)
            take_step()
            thread.start()
            thread.join()
    finally:
        profiling.disable()
    counts = {e.key: e.count for e in profiler.key_averages() if e.key.startswith("pinet_fast/")}
    entered = [call[1:] for call in STEP if call != "-"]
    # The profiler of this thread records this thread; the other one must merely do no harm.
    assert all(counts[f"pinet_fast/{name}"] >= 1 for name in entered)
    assert set(counts) == {f"pinet_fast/{name}" for name in entered}


def test_both_enter_both_and_an_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nvtx, other = Recorder(), Recorder()
    monkeypatch.setattr(profiling, "_Nvtx", lambda: nvtx)
    monkeypatch.setattr(profiling, "_TorchProfiler", lambda: other)
    for mode, shown in (("nvtx", (1, 0)), ("torch", (0, 1)), ("both", (1, 1))):
        nvtx.calls.clear(), other.calls.clear()
        profiling.enable(mode)  # type: ignore[arg-type]
        try:
            with profiling.GRAM:
                pass
        finally:
            profiling.disable()
        assert (len(nvtx.calls) // 2, len(other.calls) // 2) == shown
    with pytest.raises(ConfigError, match="'nvtx', 'torch' or 'both', got 'nsight'"):
        profiling.enable("nsight")  # type: ignore[arg-type]


def test_off_by_default_and_real_nvtx_works() -> None:
    code = (
        "from pinet_fast import profiling as p\n"
        "assert not p.is_enabled()\n"
        "import sys; assert 'nvtx' not in sys.modules\n"
        "p.enable(); assert p.is_enabled()\n"
        "with p.STEP, p.GRAM: pass\n"
        "assert p.STEP.attributes is not None or 'Dummy' in type(p._sinks[0]._domain).__name__\n"
        "p.disable(); assert not p.is_enabled()\n"
        "with p.STEP: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    check = "from pinet_fast import profiling as p; assert p.is_enabled()"
    subprocess.run([sys.executable, "-c", check], check=True, env={"PINET_FAST_NVTX": "1"})
