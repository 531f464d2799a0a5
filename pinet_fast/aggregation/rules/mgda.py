"""MGDA: the shortest gradient in the convex hull of the stratum gradients."""

from __future__ import annotations

from pinet_fast.aggregation.rules.solved import SolvedRule


class MGDA(SolvedRule):
    """Minimise ``||sum_s w_s g_s||`` over the simplex: a descent direction of every stratum.

    Closed form for two strata; otherwise an interior-point method of fixed length, whose
    optimality conditions hold to 1e-8 of the largest squared norm. Where several weights are
    minimal (equal gradients) it takes their middle.

    Source:
        Desideri, Multiple-gradient descent algorithm (2012); Sener and Koltun, Multi-task learning
        as multi-objective optimization (arXiv 1810.04650), equations 3 and, for two, 5.
    """

    claims = frozenset({"convex", "non_conflicting", "scale_invariant", "equivariant", "mean"})
    solver = "mgda"

    def __repr__(self) -> str:
        return "MGDA()"
