"""SignAgreement: per coordinate, only the strata on the majority's side count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.aggregation.rules.base import ElementwiseRule

if TYPE_CHECKING:
    from torch import Tensor


class SignAgreement(ElementwiseRule):
    """Per coordinate, sum the strata that share the majority's sign and divide by all that count.

    With n strata that count and ``v = sign(sum_s sign(g_s))``: the result is
    ``(1/n) sum_{s: sign(g_s) = v} g_s``, and 0 where the vote is tied. Equal gradients give their
    mean. A zero abstains from the vote and counts in n. In item tables the n strata that touched
    the item's row count.

    Args:
        unanimous: Keep only coordinates in which all n strata have one sign; with two strata the
            same thing.

    Source:
        Mansilla et al., Domain generalization via gradient surgery (ICCV 2021, arXiv 2108.01621):
        ``unanimous=True`` is its Agr-Sum divided by n; the majority vote is our generalisation.
    """

    claims = frozenset({"scale_invariant", "equivariant", "mean"})

    def __init__(self, unanimous: bool = False) -> None:
        self.unanimous = unanimous

    def combine(self, gradients: Tensor, touched: Tensor | None) -> Tensor:
        """Return the kept sum over n."""
        count: Tensor | float = float(gradients.shape[0])
        if touched is not None:
            gradients = gradients.masked_fill(~touched.unsqueeze(-1), 0.0)
            count = touched.sum(0).clamp_min(1).to(gradients.dtype).unsqueeze(-1)
        signs = gradients.sign()
        vote = signs.sum(0)
        kept = (signs == vote.sign()) & (vote != 0)
        if self.unanimous:
            kept = kept & (vote.abs() >= count)
        return torch.where(kept, gradients, 0.0).sum(0) / count

    def __repr__(self) -> str:
        return f"SignAgreement(unanimous={self.unanimous})"
