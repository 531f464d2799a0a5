"""Aligned-MTL: the mean after the stratum gradients were made orthogonal and equally long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.aggregation.rules.base import GramRule
from pinet_fast.aggregation.rules.spectrum import spectrum

if TYPE_CHECKING:
    from torch import Tensor


class AlignedMTL(GramRule):
    """Replace the gradients by the nearest system with condition number one; take its mean.

    ``w = sqrt(l) G^(-1/2) 1 / K`` with l the smallest eigenvalue of the Gram that is not rounding
    (1e-12 of the largest), so that no principal component grows. Nearly dependent gradients
    therefore shorten the step; exactly dependent ones count as one component.

    Source:
        Senushkin et al., Independent component alignment for multi-task learning (CVPR 2023,
        arXiv 2305.19000), Algorithm 1, with uniform preferences.
    """

    claims = frozenset({"scale_invariant", "equivariant", "mean"})

    def weights(self, gram: Tensor) -> Tensor:
        """Return ``sqrt(l) G^(-1/2) 1 / K``."""
        size = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        found = spectrum(gram / size.clamp_min(torch.finfo(gram.dtype).tiny).unsqueeze(-1))
        smallest = found.values.masked_fill(~found.kept, torch.inf).amin(-1, keepdim=True)
        nothing = ~found.kept.any(-1, keepdim=True)  # all gradients are zero
        root = smallest.masked_fill(nothing, 0.0).sqrt()
        weights = root * found.power(-0.5).mean(-1)
        return torch.where(nothing, 1 / gram.shape[-1], weights) + size * 0  # a NaN stays one

    def __repr__(self) -> str:
        return "AlignedMTL()"
