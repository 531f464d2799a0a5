"""Counts that no load on the machine changes: calls, allocations and host syncs of a step.

``make guards`` writes them into guards.json; a test compares what they are with what was committed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pinet_fast
from benchmarks.harness.memory import allocations
from pinet_fast import GradientAggregator, RaggedBatch, SASRec, StrataIndex

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

FILE = Path(__file__).with_suffix(".json")
WARM_UP = 4  # the leak check proves its sites on the first steps
STEPS = {
    "plain": None,
    "backdoor": ("backdoor", 4),
    "agreement": ("agreement", 4),
    "agreement, S = 8": ("agreement", 8),
    "mgda": ("mgda", 4),
    "trimmedmean": ("trimmedmean", 4),
}

# What makes a host wait for a device.
_SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim",
          "unique_consecutive", "masked_select")  # fmt: skip


class Dispatched(TorchDispatchMode):
    """Counts the operators that reach the dispatcher, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def syncs(self) -> int:
        """Return how many of them make the host wait."""
        return sum(self.calls[name] for name in _SYNCS)


def batch_of(num_strata: int) -> RaggedBatch:
    """Return 16 users of 6 events: counts of calls are those of any size."""
    users, length, items = 16, 6, 100
    generator = torch.Generator().manual_seed(0)
    values, targets, negatives = torch.randint(
        1, items + 1, (3, users * length), generator=generator
    )
    lengths = torch.full((users,), length)
    return RaggedBatch(
        values=values,
        offsets=torch.arange(users + 1) * length,
        strata=StrataIndex(torch.arange(users) * num_strata // users, num_strata, lengths),
        users=torch.arange(users),
        targets=targets,
        negatives=negatives.unsqueeze(1),
        max_len=length,
    )


def step_of(rule: str | None, num_strata: int = 4) -> Callable[[], None]:
    """Return a step of SASRec, plain where there is no rule, warmed up."""
    torch.manual_seed(0)
    batch, model = batch_of(num_strata), SASRec(100, max_len=6, loss="bce", dropout=0.2)
    adam = torch.optim.Adam(model.parameters())
    opt = adam if rule is None else GradientAggregator(adam, rule)

    def step() -> None:
        opt.zero_grad()
        if isinstance(opt, GradientAggregator):
            with opt.stratify(batch.strata):
                losses = model(batch)
            opt.backward(losses)
        else:
            model(batch).mean().backward()
        opt.step()

    for _ in range(WARM_UP):
        step()
    return step


def counts(step: Callable[[], None]) -> dict[str, int]:
    """Return the counts of one step.

    Returns:
        ``dispatched`` operators, ``syncs`` among them, ``allocations`` of tensor memory,
        ``bytes`` of all of those together, and ``python_calls`` of this package's functions.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several allocate for their partial sums
    try:
        return _counts(step)
    finally:
        torch.set_num_threads(threads)


def own_calls(step: Callable[[], None]) -> int:
    """Return how many calls of this package's Python functions a step makes."""
    root = str(Path(pinet_fast.__file__).parents[1])
    homes = (f"{root}/pinet_fast/", f"{root}/kernels/")
    number = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal number
        number += event == "call" and frame.f_code.co_filename.startswith(homes)

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return number


def _counts(step: Callable[[], None]) -> dict[str, int]:
    with Dispatched() as dispatched:
        step()
    sizes = [size for size in allocations(step) if size > 0]
    return {
        "dispatched": dispatched.calls.total(),
        "syncs": dispatched.syncs,
        "allocations": len(sizes),
        "bytes": sum(sizes),
        "python_calls": own_calls(step),
    }


def all_counts() -> dict[str, dict[str, int]]:
    """Return the counts of every step."""
    return {name: counts(step_of(*(what or (None,)))) for name, what in STEPS.items()}


def committed() -> dict[str, dict[str, int]]:
    """Return the counts in guards.json."""
    found: dict[str, dict[str, int]] = json.loads(FILE.read_text())
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(all_counts(), indent=1) + "\n")
