"""What the library's own Gram rules share: one op computes their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pinet_fast.aggregation.rules.base import GramRule
from pinet_fast.kernels import stratum_solve

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
        weights: Tensor = stratum_solve(gram.double(), self.solver, present=present)
        return weights
