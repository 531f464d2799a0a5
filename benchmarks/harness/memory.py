"""Peak memory of tensors, counted from every allocation, whatever else the machine does."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def allocations(function: Callable[[], Any]) -> list[int]:
    """Return the bytes of every allocation of tensor memory, in order; negative: given back."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    # profiler.events() hands what an operator allocated to that operator; here each counts.
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most that a call holds above what was held before it."""
    return max(itertools.accumulate(allocations(function), initial=0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the profiler's C++ side prints of starting and stopping."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
