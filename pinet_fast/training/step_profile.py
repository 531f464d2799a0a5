"""Where the time of a training step goes, phase by phase."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from pinet_fast import profiling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pinet_fast.data import RaggedBatch, RaggedLoader
    from pinet_fast.training.stages import Stage

_PREFIX = f"{profiling.DOMAIN}/"


@dataclass(frozen=True)
class Phase:
    """The time of one kind of work.

    Attributes:
        category: Such as ``data/gather``.
        name: The range's name; for boundaries the torch function.
        calls: Calls a step.
        ms: Milliseconds a step on the host, time of phases inside it included.
        device_ms: Milliseconds a step of the kernels begun inside it; 0 without a GPU.
        share: Part of the profiled step's time.
        inside: The phase that it is a part of, or None for a phase of its own.
    """

    category: str
    name: str
    calls: float
    ms: float
    device_ms: float
    share: float
    inside: str | None


@dataclass(frozen=True)
class StepProfile:
    """Steps as they ran, without and under torch.profiler.

    Attributes:
        steps: Steps of each measurement.
        ms: Milliseconds a step without a profiler, batches included.
        profiled_ms: Milliseconds a step under the profiler, whose own cost is in all phases.
        phases: In the order of a step.
        rest_ms: Milliseconds a step outside every phase.
    """

    steps: int
    ms: float
    profiled_ms: float
    phases: tuple[Phase, ...]
    rest_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return asdict(self)


def warm_up(stage: Stage, steps: int) -> Iterator[RaggedBatch]:
    """Take steps that are not measured: kernels compile and the leak check proves its sites.

    Args:
        stage: Trains.
        steps: Steps to take.

    Returns:
        The batches that follow, without end.
    """
    batches = _endless(stage.loader)
    for _ in range(steps):
        stage.train_step(next(batches))
    return batches


def _endless(loader: RaggedLoader) -> Iterator[RaggedBatch]:
    while True:
        yield from loader


def run_bracketed(stage: Stage, batches: Iterator[RaggedBatch], steps: int) -> float:
    """Take steps with NVTX ranges on, between cudaProfilerStart and Stop where CUDA is there.

    Returns:
        Milliseconds a step.
    """
    was_on, has_cuda = profiling.is_enabled(), torch.cuda.is_available()
    profiling.enable("nvtx")
    try:
        if has_cuda:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
        try:
            return _timed(stage, batches, steps)
        finally:
            if has_cuda:
                torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]
    finally:
        if not was_on:
            profiling.disable()


def profile_steps(
    stage: Stage, batches: Iterator[RaggedBatch], steps: int, trace: Path | None = None
) -> StepProfile:
    """Take steps without and then under torch.profiler.

    Args:
        stage: Trains.
        batches: Its batches, without end.
        steps: Steps of each measurement.
        trace: Where the profiler's trace goes, in the form that Perfetto and chrome://tracing
            open; None writes none.
    """
    ms = _timed(stage, batches, steps)
    was_on = profiling.is_enabled()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiling.enable("both" if was_on else "torch")
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            profiled_ms = _timed(stage, batches, steps)
    finally:
        profiling.disable()
        if was_on:
            profiling.enable()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    phases = _phases(profiler, steps, profiled_ms)
    own = sum(phase.ms for phase in phases if phase.inside is None)
    return StepProfile(steps, ms, profiled_ms, phases, max(0.0, profiled_ms - own))


def _timed(stage: Stage, batches: Iterator[RaggedBatch], steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        stage.train_step(next(batches))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3 / steps


def _phases(profiler: torch.profiler.profile, steps: int, step_ms: float) -> tuple[Phase, ...]:
    found = []
    for event in profiler.key_averages():
        if not event.key.startswith(_PREFIX):
            continue
        category, _, name = event.key.removeprefix(_PREFIX).rpartition("/")
        ms = event.cpu_time_total / 1e3 / steps
        device_ms = getattr(event, "device_time_total", 0) / 1e3 / steps
        inside = None
        if category == "model/boundary":
            inside = profiling.FORWARD.name
        elif name == profiling.LEAK_CHECK.name:
            inside = profiling.BACKWARD.name
        found.append(
            Phase(category, name, event.count / steps, ms, device_ms, ms / step_ms, inside)
        )
    order = [(phase.category, phase.name) for phase in profiling.PHASES]
    forward = order.index((profiling.FORWARD.category, profiling.FORWARD.name))

    def place(phase: Phase) -> tuple[float, float]:
        key = (phase.category, phase.name)
        return (order.index(key), 0.0) if key in order else (forward + 0.5, -phase.ms)

    return tuple(sorted(found, key=place))
