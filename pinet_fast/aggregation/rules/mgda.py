"""MGDA: the shortest gradient in the convex hull of the stratum gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.aggregation.rules.base import GramRule
from pinet_fast.aggregation.rules.simplex import minimise

if TYPE_CHECKING:
    from torch import Tensor


class MGDA(GramRule):
    """Minimise ``||sum_s w_s g_s||`` over the simplex: a descent direction of every stratum.

    Closed form for two strata; otherwise an interior-point method of fixed length (2 ms), whose
    optimality conditions hold to 1e-8 of the largest squared norm. Where several weights are
    minimal (equal gradients) it takes their middle.

    Source:
        Desideri, Multiple-gradient descent algorithm (2012); Sener and Koltun, Multi-task learning
        as multi-objective optimization (arXiv 1810.04650), equations 3 and, for two, 5.
    """

    claims = frozenset({"convex", "non_conflicting", "scale_invariant", "equivariant", "mean"})

    def weights(self, gram: Tensor) -> Tensor:
        """Return the minimal point of the simplex."""
        if gram.shape[-1] == 2:
            return self._two(gram)
        size = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(gram.dtype).tiny)
        return minimise(gram / size[..., None, None])

    @staticmethod
    def _two(gram: Tensor) -> Tensor:
        first, both, second = gram[..., 0, 0], gram[..., 0, 1], gram[..., 1, 1]
        apart = first + second - 2 * both  # ||g_0 - g_1||^2
        equal = apart <= torch.finfo(gram.dtype).eps * (first + second)
        share = ((second - both) / apart.masked_fill(equal, 1.0)).clamp(0, 1)
        share = share.masked_fill(equal, 0.5)
        return torch.stack([share, 1 - share], dim=-1)

    def __repr__(self) -> str:
        return "MGDA()"
