"""Agreement-weighted aggregation: strata weigh by how much they agree with the others."""

from __future__ import annotations

import torch
from torch import Tensor

from pinet_fast.aggregation.rules.base import GramRule


class Agreement(GramRule):
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

    def __init__(self, per_parameter: bool = True) -> None:
        self.per_parameter = per_parameter

    def weights(self, gram: Tensor) -> Tensor:
        """Return the softmax weights of the agreeing strata, zero for the others."""
        square = gram.diagonal(dim1=-2, dim2=-1)
        # A stratum that leaves a parameter untouched has no direction: its cosines are 0.
        norm = square.clamp_min(0).sqrt()
        inverse = torch.where(norm > 0, 1 / norm.clamp_min(torch.finfo(gram.dtype).tiny), 0.0)
        cosines = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
        keep = gram.sum(-1) * inverse > 0  # the sign of cos(m, g_k)
        keep = keep | ~keep.any(-1, keepdim=True)
        agreement = (cosines * keep.unsqueeze(-2).to(gram.dtype)).sum(-1)
        return torch.softmax(agreement.masked_fill(~keep, -torch.inf), dim=-1)

    def __repr__(self) -> str:
        return f"Agreement(per_parameter={self.per_parameter})"
