"""CAGrad: the worst stratum's gain, maximised near the mean gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pinet_fast.aggregation.rules.solved import SolvedRule
from pinet_fast.errors import ConfigError
from pinet_fast.kernels import stratum_solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class CAGrad(SolvedRule):
    """Maximise ``min_s <g_s, d>`` over the ball ``||d - g_0|| <= c ||g_0||`` around the mean g_0.

    ``d = g_0 + (c ||g_0|| / ||g_w||) g_w``, where w minimises ``<g_w, g_0> + c ||g_0|| ||g_w||``
    over the simplex, ``g_w = sum_s w_s g_s``. The result is ``d / (1 + c)``, so that equal
    gradients give their mean; the paper's step is ``1 + c`` times as long.

    Solved by an interior-point method of fixed length, to about 1e-5 of the largest squared norm.

    Args:
        c: Radius of the ball, in [0, 1); 0 = the mean.

    Raises:
        ConfigError: A radius out of range.

    Source:
        Liu et al., Conflict-averse gradient descent (arXiv 2110.14048), Algorithm 1.
    """

    claims = frozenset({"scale_invariant", "equivariant", "mean"})
    solver = "cagrad"

    def __init__(self, c: float = 0.5) -> None:
        if not 0 <= c < 1:
            raise ConfigError(f"CAGrad: expected 0 <= c < 1, got {c}")
        self.c = c

    def _solve(self, gram: Tensor, present: Sequence[bool] | None) -> Tensor:
        weights: Tensor = stratum_solve(gram.double(), self.solver, present=present, c=self.c)
        return weights

    def __repr__(self) -> str:
        return f"CAGrad(c={self.c})"
