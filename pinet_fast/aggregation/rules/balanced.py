"""Balanced: every stratum contributes a gradient of the same norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.aggregation.rules.base import GramRule

if TYPE_CHECKING:
    from torch import Tensor

_NOISE = 1e-8  # norms below this share of the largest are rounding, not a direction


class Balanced(GramRule):
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

    def weights(self, gram: Tensor) -> Tensor:
        """Return the mean norm over K times the stratum's own norm."""
        norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        tiny = torch.finfo(gram.dtype).tiny
        seen = norm > _NOISE * norm.amax(-1, keepdim=True).clamp_min(tiny)
        count = seen.sum(-1, keepdim=True).clamp_min(1)
        mean = norm.masked_fill(~seen, 0.0).sum(-1, keepdim=True) / count
        balanced = (mean / norm.clamp_min(tiny) / count).masked_fill(~seen, 0.0)
        nobody = norm.amax(-1, keepdim=True) <= 0
        weights = torch.where(nobody, 1 / gram.shape[-1], balanced)
        return weights + (norm * 0)  # a NaN stays one

    def __repr__(self) -> str:
        return "Balanced()"
