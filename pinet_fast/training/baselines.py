"""What any model must beat: the same items for everyone, most popular first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.training.evaluate import Ranking, rank_targets

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from pinet_fast.data import EvaluationBatch, RaggedBatch


class Popularity:
    """Scores every item by the logarithm of one more than its training events, for every user.

    It has the serving half of ``pinet_fast.models.Backbone``. As logits, these scores are no
    probabilities: their log loss says nothing.

    Args:
        counts: Training events of every item, int64 [V + 1].
    """

    state_dim = 0
    max_len = 1

    def __init__(self, counts: npt.NDArray[np.int64]) -> None:
        self.num_items = len(counts) - 1
        self.log_counts = torch.from_numpy(counts).float().log1p()

    def training_states(self, batch: RaggedBatch) -> Tensor:
        """There is nothing to train."""
        raise NotImplementedError

    def training_losses(self, states: Tensor, batch: RaggedBatch) -> Tensor:
        """There is nothing to train."""
        raise NotImplementedError

    def serving_states(self, batch: RaggedBatch, candidates: Tensor | None = None) -> Tensor:
        """Return a state without content for every user, [B, 0]."""
        return torch.empty((batch.num_users, 0))

    def serving_scores(self, states: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return the scores of candidates, [B, K], or of the catalogue, [B, V + 1]."""
        if candidates is not None:
            return self.log_counts[candidates]
        return self.log_counts.repeat(len(states), 1)


def popularity_ranking(
    counts: npt.NDArray[np.int64], batches: Iterable[EvaluationBatch]
) -> Ranking:
    """Rank held-out items by popularity, as a backbone would be ranked."""
    return rank_targets(Popularity(counts), None, batches)
