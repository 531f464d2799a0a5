"""Gradients between backward and step: stratum gradients add up, and ``p.grad`` follows them.

Several backwards before one step (gradient accumulation) are combined anew from the sum of their
stratum gradients, as if the batch had been one; not from the sum of what the rule made of each.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pinet_fast.aggregation.collection import Collected
    from pinet_fast.aggregation.stratum_gradient import StratumGradient


@dataclass(slots=True)
class Entry:
    """What one parameter has received since the last step.

    Attributes:
        parameter: The parameter.
        strata: Sum of its stratum gradients; None where only a batch-free term reached it.
        term: Sum of the gradients of batch-free terms; None = none.
        before: ``p.grad`` before the first of these backwards.
        written: ``p.grad`` and its version as left by the last one.
    """

    parameter: Tensor
    strata: StratumGradient | None
    term: Tensor | None
    before: Tensor | None
    written: tuple[Tensor, int] | None = None

    @property
    def is_untouched(self) -> bool:
        """Return whether ``p.grad`` is as the last backward left it."""
        grad = self.parameter.grad
        return self.written is not None and grad is self.written[0] and (
            grad._version == self.written[1]
        )  # fmt: skip


class PendingGradients:
    """The stratum gradients of the backwards since the last step."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._present: list[bool] = []

    def clear(self) -> None:
        """Forget them: their step was taken, or their gradients were cleared."""
        self._entries = {}
        self._present = []

    def add(
        self, parameters: Sequence[Tensor], collected: Collected, present: Sequence[bool]
    ) -> list[bool]:
        """Add one backward; return which strata were present in any of those added up.

        Where something else has written to ``p.grad`` since (clipping, a plain backward, a reset),
        the earlier backwards are left in it as they are, and the sum starts anew.
        """
        if self._entries and not all(entry.is_untouched for entry in self._entries.values()):
            self.clear()
        before = self._present or [False] * len(present)
        self._present = [a or b for a, b in zip(before, present, strict=True)]
        for p, strata, term in zip(parameters, collected.strata, collected.terms, strict=True):
            if strata is None and term is None:
                continue
            entry = self._entries.get(id(p))
            if entry is None:
                self._entries[id(p)] = Entry(p, strata, term, p.grad)
                continue
            if strata is not None:
                entry.strata = strata if entry.strata is None else entry.strata.plus(strata, p)
            entry.term = summed(entry.term, term)
        return self._present

    def touched(self) -> list[tuple[Tensor, StratumGradient]]:
        """Return the parameters that have stratum gradients, and these."""
        entries = self._entries.values()
        return [(e.parameter, e.strata) for e in entries if e.strata is not None]

    @torch.no_grad()
    def write(self, combined: Sequence[Tensor]) -> None:
        """Write ``p.grad``; the parameters' own hooks run on what the rule made.

        Args:
            combined: The combined gradient of every parameter in :meth:`touched`.
        """
        gradients = iter(combined)
        for entry in self._entries.values():
            p = entry.parameter
            gradient = None if entry.strata is None else next(gradients)
            if entry.term is not None:
                gradient = summed(gradient, entry.term)
            assert gradient is not None
            hooks = p._backward_hooks
            if hooks:
                for hook in list(hooks.values()):
                    changed = hook(gradient)
                    gradient = gradient if changed is None else changed
            if entry.before is not None:
                gradient = summed(entry.before, gradient)
            p.grad = gradient
            assert gradient is not None
            entry.written = (gradient, gradient._version)
        for entry in self._entries.values():
            after = entry.parameter._post_accumulate_grad_hooks
            if after:
                for hook in list(after.values()):
                    hook(entry.parameter)


def summed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, dense or sparse, of which either may be missing."""
    if a is None or b is None:
        return b if a is None else a
    total = b + a if a.is_sparse and not b.is_sparse else a + b
    return total.coalesce() if total.is_sparse else total


@contextmanager
def gradients_apart(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Have ``p.grad`` start empty inside; gradients from before and hooks are put back after."""
    before = [p.grad for p in parameters]
    hooked = [
        (p, name, hooks)
        for p in parameters
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
        if (hooks := getattr(p, name)) is not None
    ]
    for p, name, _ in hooked:
        setattr(p, name, OrderedDict())  # None would leave post-accumulate hooks installed
    for p, grad in zip(parameters, before, strict=True):
        if grad is not None:
            p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, before, strict=True):
            if p.grad is not grad:
                p.grad = grad
        for p, name, hooks in hooked:
            setattr(p, name, hooks)
