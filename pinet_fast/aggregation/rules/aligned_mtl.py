"""Aligned-MTL: the mean after the stratum gradients were made orthogonal and equally long."""

from __future__ import annotations

from pinet_fast.aggregation.rules.solved import SolvedRule


class AlignedMTL(SolvedRule):
    """Replace the gradients by the nearest system with condition number one; take its mean.

    ``w = sqrt(l) G^(-1/2) 1 / K`` with l the smallest eigenvalue of the Gram that is not rounding
    (1e-12 of the largest), so that no principal component grows. Nearly dependent gradients
    therefore shorten the step; exactly dependent ones count as one component.

    Source:
        Senushkin et al., Independent component alignment for multi-task learning (CVPR 2023,
        arXiv 2305.19000), Algorithm 1, with uniform preferences.
    """

    claims = frozenset({"scale_invariant", "equivariant", "mean"})
    solver = "alignedmtl"

    def __repr__(self) -> str:
        return "AlignedMTL()"
