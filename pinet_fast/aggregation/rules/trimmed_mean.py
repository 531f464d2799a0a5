"""TrimmedMean: per coordinate, the mean without the extreme strata."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.aggregation.rules.base import ElementwiseRule
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class TrimmedMean(ElementwiseRule):
    """Per coordinate, drop the ``trim`` largest and ``trim`` smallest strata; mean of the others.

    Where n strata count and ``2 trim >= n``, as many are dropped as leave one or two: the median.
    In item tables the n strata that touched the item's row count. Two strata are never trimmed.

    Args:
        trim: Strata to drop at each end, >= 0; 0 = the mean.

    Raises:
        ConfigError: A negative number, or none.

    Source:
        Yin et al., Byzantine-robust distributed learning (arXiv 1803.01498), Definition 2, with a
        number of strata for the share beta.
    """

    claims = frozenset({"scale_invariant", "equivariant", "mean"})

    def __init__(self, trim: int = 1) -> None:
        if not isinstance(trim, int) or trim < 0:
            raise ConfigError(f"TrimmedMean: expected a whole number >= 0 for trim, got {trim!r}")
        self.trim = trim

    def combine(self, gradients: Tensor, touched: Tensor | None) -> Tensor:
        """Return the mean of what lies between the extremes."""
        num_strata = gradients.shape[0]
        if touched is None:
            trim = min(self.trim, (num_strata - 1) // 2)
            return gradients.sort(dim=0).values[trim : num_strata - trim].mean(0)
        # Strata that did not touch the row go last, where no position counts.
        ordered = gradients.masked_fill(~touched.unsqueeze(-1), torch.inf).sort(dim=0).values
        count = touched.sum(0)
        ends = ((count - 1) // 2).clamp(0, self.trim)  # [U]
        position = torch.arange(num_strata, device=gradients.device).unsqueeze(-1)
        kept = (position >= ends) & (position < count - ends)  # [K, U]
        total = torch.where(kept.unsqueeze(-1), ordered, 0.0).sum(0)
        return total / (count - 2 * ends).clamp_min(1).to(gradients.dtype).unsqueeze(-1)

    def __repr__(self) -> str:
        return f"TrimmedMean(trim={self.trim})"
