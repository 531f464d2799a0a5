"""Agreement-weighted aggregation: strata weigh by how much they agree with the others."""

from __future__ import annotations

from pinet_fast.aggregation.rules.solved import SolvedRule


class Agreement(SolvedRule):
    """Keep the strata that agree with the mean gradient and weigh them by mutual agreement.

    With the mean gradient ``m = (1/K) sum_k g_k``: keep ``C = {k : cos(m, g_k) > 0}``; weigh by
    ``w = softmax over i in C of sum_{j in C} cos(g_i, g_j)``; the result is ``sum_C w_k g_k``. A
    convex combination, in which rows do not count: each stratum stands for itself.

    Where no stratum agrees with the mean (the gradients cancel), all weigh alike, which gives the
    mean.

    Args:
        per_parameter: Decide for every parameter apart (default), or once for the whole model.

    Source:
        The rule of the paper authors' later public code, as far as the code tells; the paper's own
        formula (arXiv 2208.09130) was not at hand, so that this is the paper's rule is our reading.
    """

    claims = frozenset({"convex", "scale_invariant", "equivariant", "mean"})
    solver = "agreement"

    def __init__(self, per_parameter: bool = True) -> None:
        self.per_parameter = per_parameter

    def __repr__(self) -> str:
        return f"Agreement(per_parameter={self.per_parameter})"
