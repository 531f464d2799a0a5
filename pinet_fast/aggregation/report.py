"""What one aggregated step saw and did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["one-pass", "exact", "reweighted", "plain"]
LeakState = Literal["proven", "armed", "unchecked", "attributed-by-row"]


@dataclass(frozen=True)
class AggregationReport:
    """The last step's stratum gradients, losses and weights.

    Attributes:
        mode: How the gradients were made. ``"one-pass"`` and ``"exact"``: from stratum gradients.
            ``"reweighted"``: a constant rule, one plain backward of the reweighted losses.
            ``"plain"``: ``step()`` ran on gradients that no ``stratify`` made.
        counts: Loss rows of every stratum in the batch, S ints.
        unit: What a loss row is: ``"users"`` or ``"events"``.
        losses: Mean loss of every stratum, float [S]; NaN for absent ones. None where only a
            reduced scalar was seen.
        weights: Weight of every stratum, float64 [S]; [n_params, S] for per-parameter rules.
        gram: Inner products of the stratum gradients over all parameters, float64 [S, S]; None
            where no stratum gradients were computed.
        leak: ``"proven"`` (every boundary), ``"armed"`` (some lack proof), ``"unchecked"``,
            ``"attributed-by-row"`` (users mix, as ``stratify`` was told to accept).
    """

    mode: Mode
    counts: tuple[int, ...] = ()
    unit: str = "users"
    losses: Tensor | None = None
    weights: Tensor | None = None
    gram: Tensor | None = None
    leak: LeakState = "unchecked"

    @property
    def norms(self) -> Tensor | None:
        """Return the Euclidean norm of every stratum gradient, float64 [S]."""
        return None if self.gram is None else self.gram.diagonal().clamp_min(0).sqrt()

    @property
    def cosines(self) -> Tensor | None:
        """Return the cosines between stratum gradients, float64 [S, S]; 0 where one is zero."""
        if self.gram is None or self.norms is None:
            return None
        scale = self.norms.unsqueeze(0) * self.norms.unsqueeze(1)
        return torch.where(scale > 0, self.gram / scale.clamp_min(1e-300), 0.0).clamp(-1, 1)
