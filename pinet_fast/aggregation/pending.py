"""Gradients between backward and step: stratum gradients add up, and ``p.grad`` follows them.

Several backwards before one step (gradient accumulation) are combined anew from the sum of their
stratum gradients, as if the batch had been one; not from the sum of what the rule made of each.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast.aggregation import compiled
from pinet_fast.kernels import _registry

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
    """The stratum gradients of the backwards since the last step.

    Nearly always there is one backward: what it left is taken apart, an entry a parameter, where
    something has to be done for each.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget them: their step was taken, or their gradients were cleared."""
        self._entries: dict[int, Entry] = {}
        self._present: list[bool] = []
        self._single: list[tuple[Tensor, StratumGradient]] = []
        self._written: list[Tensor] | None = None

    def add(
        self, parameters: Sequence[Tensor], collected: Collected, present: Sequence[bool]
    ) -> list[bool]:
        """Add one backward; return which strata were present in any of those added up.

        Where something else has written to ``p.grad`` since (clipping, a plain backward, a reset),
        the earlier backwards are left in it as they are, and the sum starts anew.
        """
        self._take_apart()
        if self._entries and not all(entry.is_untouched for entry in self._entries.values()):
            self.clear()
        before = self._present or [False] * len(present)
        self._present = [a or b for a, b in zip(before, present, strict=True)]
        if not self._entries and not collected.terms:
            pairs = zip(parameters, collected.strata, strict=True)
            self._single = [(p, strata) for p, strata in pairs if strata is not None]
            return self._present
        for i, (p, strata) in enumerate(zip(parameters, collected.strata, strict=True)):
            term = collected.terms.get(i)
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

    def _take_apart(self) -> None:
        """Make an entry a parameter of the only backward."""
        for i, (p, strata) in enumerate(self._single):
            if self._written is None:
                entry = Entry(p, strata, None, p.grad)
            else:  # new tensors, that nobody had written to before
                entry = Entry(p, strata, None, None, (self._written[i], 0))
            self._entries[id(p)] = entry
        self._single, self._written = [], None

    def touched(self) -> list[tuple[Tensor, StratumGradient]]:
        """Return the parameters that have stratum gradients, and these."""
        if self._single:
            return self._single
        entries = self._entries.values()
        return [(e.parameter, e.strata) for e in entries if e.strata is not None]

    def write_weighted(self, weights: Tensor) -> bool:
        """Write every ``p.grad`` in one compiled call, where that is all there is to do.

        Not where several backwards add up, nor where ``p.grad``, hooks or a sparse gradient want
        something of their own; nothing is written then.

        Args:
            weights: Of the strata, float64 [S], or [P, S] for the parameters in :meth:`touched`.

        Returns:
            Whether it was done.
        """
        functions = compiled.functions()
        if functions is None or not self._single:
            return False
        if not _registry.is_first("cpp", ("stratum_combine",)):
            return False
        parameters, values, rows = [], [], []
        for p, gradient in self._single:
            if gradient.is_sparse:
                return False
            parameters.append(p)
            values.append(gradient.values)
            rows.append(gradient.rows)
        self._written = functions.write(parameters, values, rows, weights)
        if self._written is None:
            return False
        _registry.record_call("stratum_combine", "cpp")
        return True

    @torch.no_grad()
    def write(self, combined: Sequence[Tensor]) -> None:
        """Write ``p.grad``; the parameters' own hooks run on what the rule made.

        Args:
            combined: The combined gradient of every parameter in :meth:`touched`.
        """
        self._take_apart()
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


def hold_nothing(parameters: list[Tensor]) -> bool:
    """Return whether no parameter has a gradient or hooks; False may be said of others too."""
    functions = compiled.functions()
    return functions is not None and functions.holds_nothing(parameters)


@contextmanager
def gradients_apart(parameters: list[Tensor]) -> Iterator[None]:
    """Have ``p.grad`` start empty inside; gradients from before and hooks are put back after."""
    before: list[Tensor | None] = []
    hooked: list[tuple[Tensor, str, Any]] = []
    if not hold_nothing(parameters):
        before = [p.grad for p in parameters]
        hooked = [
            (p, name, hooks)
            for p in parameters
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
            if (hooks := getattr(p, name)) is not None
        ]
    for p, name, _ in hooked:
        setattr(p, name, OrderedDict())  # None would leave post-accumulate hooks installed
    for p, grad in zip(parameters, before, strict=False):
        if grad is not None:
            p.grad = None
    try:
        yield
    finally:
        if before or not hold_nothing(parameters):
            for p, grad in zip(parameters, before or [None] * len(parameters), strict=True):
                if p.grad is not grad:
                    p.grad = grad
        for p, name, hooks in hooked:
            setattr(p, name, hooks)
