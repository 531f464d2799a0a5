"""Balanced: every stratum contributes a gradient of the same norm."""

from __future__ import annotations

from pinet_fast.aggregation.rules.solved import SolvedRule


class Balanced(SolvedRule):
    """Weigh strata by the inverse norm of their gradients, ``w_s = n / (K ||g_s||)``.

    n is the mean norm of the K strata that have a gradient, so that each contributes a vector of
    norm ``n / K``: the mean of the directions at the mean norm. Weights that sum to one instead
    would scale the step by the harmonic mean of the norms, which one stratum near its optimum
    drags to zero. Strata whose norm is below 1e-8 of the largest have no direction and weigh 0;
    where none has a gradient all weigh alike.

    Source:
        The equal-norm idea of GradNorm (Chen et al., arXiv 1711.02257) without its training-rate
        term, solved in closed form; the normalisation is ours.
    """

    claims = frozenset({"scale_invariant", "equivariant", "mean"})
    solver = "balanced"

    def __repr__(self) -> str:
        return "Balanced()"
