"""IMTL-G: the combined gradient has the same projection on every stratum's direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.aggregation.rules.base import GramRule
from pinet_fast.aggregation.rules.spectrum import spectrum

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-10  # a sum of weights below this share of their size cannot scale them to one


class IMTLG(GramRule):
    """Find weights that sum to one with ``<d, g_s / ||g_s||>`` the same for every stratum.

    With the cosines C and norms n: ``w ~ C^+ 1 / n``, the closed form of the paper in Gram terms.
    Weights may be negative, and where the strata's directions cancel (a sum near zero) they may be
    large; where there is no such combination all weigh alike. Directions that depend on each other
    share their weight; a stratum without gradient weighs 0.

    Source:
        Liu et al., Towards impartial multi-task learning (ICLR 2021), section 3.1, the closed form
        of IMTL-G.
    """

    claims = frozenset({"scale_invariant", "equivariant", "mean"})

    def weights(self, gram: Tensor) -> Tensor:
        """Return ``C^+ 1 / n``, scaled to sum to one."""
        norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        tiny = torch.finfo(gram.dtype).tiny
        inverse = torch.where(norm > 0, 1 / norm.clamp_min(tiny), 0.0)
        relative = inverse * norm.amax(-1, keepdim=True)  # of order one, whatever the loss scale
        cosines = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
        solved = spectrum(cosines).power(-1).sum(-1) * relative
        total = solved.sum(-1, keepdim=True)
        mean = total.abs() <= _TINY * solved.abs().sum(-1, keepdim=True)
        scaled = solved / total.masked_fill(mean, 1.0)
        return torch.where(mean, 1 / gram.shape[-1], scaled) + norm * 0  # a NaN stays one

    def __repr__(self) -> str:
        return "IMTLG()"
