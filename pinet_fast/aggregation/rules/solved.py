"""What the library's own Gram rules share: one op computes their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from pinet_fast.aggregation import compiled
from pinet_fast.aggregation.rules.base import GramRule
from pinet_fast.kernels import _registry, stratum_solve
from pinet_fast.kernels.stratum_solve import RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class SolvedRule(GramRule):
    """A Gram rule whose weights come from the op ``stratum_solve``: one call, no host sync.

    A Gram with a NaN or an infinity has NaN weights: the step shows the overflow.

    Attributes:
        solver: The rule's name there.
    """

    solver: ClassVar[str]

    def weights(self, gram: Tensor) -> Tensor:
        """Return the weights of strata that are all present, float64 [K] or [P, K]."""
        return self._solve(gram, None)

    def stratum_weights(self, gram: Tensor, present: Sequence[bool]) -> Tensor:
        """Return the weights of all S strata; absent ones weigh 0 and are not read."""
        if type(self).weights is not SolvedRule.weights:  # a subclass of your own says otherwise
            return super().stratum_weights(gram, present)
        return self._solve(gram, present)

    def _solve(self, gram: Tensor, present: Sequence[bool] | None) -> Tensor:
        if present is not None and not torch.compiler.is_compiling():
            found = _solved(gram, self.solver, present)
            if found is not None:
                return found
        weights: Tensor = stratum_solve(gram.double(), self.solver, present=present)
        return weights


def _solved(gram: Tensor, solver: str, present: Sequence[bool]) -> Tensor | None:
    """Return what the op does, in one compiled call, or None where that is not for it."""
    functions = compiled.functions()
    if functions is None or not _registry.is_first("cpp", ("stratum_solve",)):
        return None
    found: Tensor | None = functions.solve(gram, RULES.index(solver), present)
    if found is not None:
        _registry.record_call("stratum_solve", "cpp")
    return found
