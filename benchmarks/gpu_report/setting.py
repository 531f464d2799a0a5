"""Where the report runs and how it measures."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

# Inputs take turns, so that no call finds what it reads in the second-level cache (50 MB on H100).
_ROTATED_BYTES = 256 << 20
_MAX_ROTATED = 16


@dataclass(frozen=True)
class Setting:
    """A machine, a backend, and a size of inputs.

    Attributes:
        device: Where tensors are.
        backend: The backend that is checked and timed.
        is_tiny: Whether inputs are small and repeats few: the report's own test.
        deadline: Value of ``time.monotonic()`` after which no further case begins.
        num_repeats: How often bits are compared.
    """

    device: torch.device
    backend: str
    is_tiny: bool
    deadline: float
    num_repeats: int = 100

    @property
    def repeats(self) -> int:
        """Return how often bits are compared."""
        return 3 if self.is_tiny else self.num_repeats

    @property
    def timings(self) -> int:
        """Return of how many calls medians are."""
        return 3 if self.is_tiny else 50

    def pick(self, full: Any, tiny: Any) -> Any:
        """Return the first, or the second where inputs are tiny."""
        return tiny if self.is_tiny else full

    def has_time(self) -> bool:
        """Return whether another case may begin."""
        return time.monotonic() < self.deadline

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rotated(make: Callable[[int], tuple[Any, ...]], setting: Setting) -> list[tuple[Any, ...]]:
    """Return inputs made from several seeds, together larger than any cache."""
    inputs = [make(0)]
    size = max(sum(x.numel() * x.element_size() for x in tensors_of(inputs[0])), 1)
    count = 2 if setting.is_tiny else min(max(-(-_ROTATED_BYTES // size), 2), _MAX_ROTATED)
    inputs += [make(seed) for seed in range(1, count)]
    return inputs


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among arguments, also those in lists."""
    found: list[Tensor] = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, torch.Tensor)]
    return found


def median_seconds(
    call: Callable[..., object], inputs: Sequence[tuple[Any, ...]], setting: Setting
) -> dict[str, float]:
    """Return medians over calls: ``device`` and ``host``, in seconds.

    ``device``: between events on the GPU, with calls queued behind a pause, so that launching them
    costs nothing; it still holds the gaps where a call waits for the host. ``host``: from call to
    result, waiting for each.
    """
    for arguments in inputs[:3]:
        call(*arguments)
    host = []
    for i in range(setting.timings):
        setting.wait()
        start = time.perf_counter()
        call(*inputs[i % len(inputs)])
        setting.wait()
        host.append(time.perf_counter() - start)
    found = {"host": statistics.median(host)}
    found["device"] = _on_device(call, inputs, setting) if setting.device.type == "cuda" else 0.0
    if setting.device.type != "cuda":
        found["device"] = found["host"]
    return found


def _on_device(
    call: Callable[..., object], inputs: Sequence[tuple[Any, ...]], setting: Setting
) -> float:
    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    pairs = [(event(), event()) for _ in range(setting.timings)]
    torch.cuda._sleep(50_000_000)  # some tens of milliseconds, while calls queue up
    for i, (start, end) in enumerate(pairs):
        start.record()
        call(*inputs[i % len(inputs)])
        end.record()
    setting.wait()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill all that is allocated without being written with NaN: what stays so was left out."""
    originals = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return poisoned

    patched = [poisoning(make) for make in originals]
    torch.empty, torch.empty_like, torch.Tensor.new_empty = patched
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = originals
