"""Ranking of held-out events: among the whole catalogue, or among frozen negatives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pinet_fast.aggregation.strata_index import repeat_rows
from pinet_fast.errors import AggregationError
from pinet_fast.training.click_metrics import CandidateScores
from pinet_fast.training.metrics import mean_metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pinet_fast.data import EvaluationBatch
    from pinet_fast.models import Backbone, PINet


@dataclass(frozen=True)
class Ranking:
    """Ranks of the held-out targets.

    Attributes:
        users: Positions of the users in the store, int64 [M].
        strata: Their strata, int64 [M].
        backbone: Rank of each target under the backbone, from 1, int64 [M].
        heads: The same with plugin heads, or None without heads.
        targets: The held-out items, int64 [M].
        num_negatives: Items a target was ranked against; None where that is the catalogue.
        scores: Scores behind the ranks among negatives, by stage; empty for the catalogue.
    """

    users: npt.NDArray[np.int64]
    strata: npt.NDArray[np.int64]
    backbone: npt.NDArray[np.int64]
    heads: npt.NDArray[np.int64] | None
    targets: npt.NDArray[np.int64]
    num_negatives: int | None = None
    scores: dict[str, CandidateScores] = field(default_factory=dict)

    def quality(self, ranks: npt.NDArray[np.int64]) -> float:
        """Return what decides which epoch is kept, from the ranks of a group of users.

        NDCG@10 among the catalogue; GAUC, ties counting against the target, among negatives.
        """
        if self.num_negatives is None:
            return mean_metric(ranks)
        return float(1 - (ranks - 1).mean() / self.num_negatives) if len(ranks) else 0.0


def target_ranks(scores: Tensor, targets: Tensor, history: Tensor, offsets: Tensor) -> Tensor:
    """Return the rank of every target among all items its user has not had.

    History items are out of the race, the target never is, even if the user had it before. Ties
    count against the target, so that a model with constant scores gains nothing.

    Args:
        scores: Scores of the catalogue, [B, V + 1]; column 0 is padding. Overwritten.
        targets: The held-out items, int64 [B].
        history: All events before the target, user after user, int64 [H].
        offsets: Row offsets of ``history``, int64 [B + 1].

    Returns:
        int64 [B], from 1.

    Raises:
        AggregationError: A target's score is not finite (the model has diverged).
    """
    column = targets.unsqueeze(1)
    own = scores.gather(1, column)
    _check_finite(own)
    rows = repeat_rows(torch.arange(len(targets), device=scores.device), offsets.diff())
    scores[:, 0] = -torch.inf
    scores[rows, history] = -torch.inf
    scores.scatter_(1, column, own)
    # The target itself is among those that are not below it: rank 1 means nobody else is.
    return _not_below(scores, own)


def candidate_ranks(scores: Tensor) -> Tensor:
    """Return the rank of the first candidate of each row among all of them; ties count against it.

    Args:
        scores: [B, 1 + n]: the target's, then those of its negatives.

    Returns:
        int64 [B], from 1.

    Raises:
        AggregationError: A target's score is not finite (the model has diverged).
    """
    own = scores[:, :1]
    _check_finite(own)
    return _not_below(scores, own)


def _not_below(scores: Tensor, own: Tensor) -> Tensor:
    """Count the scores of each row that are not below its own, int64 [B]."""
    # Into int32: sums of bool into int64 take eight times as long on a CPU, more than the product.
    return (scores >= own).sum(1, dtype=torch.int32).long()


def _check_finite(own: Tensor) -> None:
    if not bool(own.isfinite().all()):
        raise AggregationError(
            "evaluation: scores are not finite: the model has diverged; lower the learning rate"
        )


@torch.no_grad()
def rank_targets(
    backbone: Backbone,
    pinet: PINet | None,
    batches: Iterable[EvaluationBatch],
    on_batch: Callable[[int], None] = lambda users: None,
) -> Ranking:
    """Rank the targets of all batches with the backbone and, where given, the plugin heads.

    Both are ranked from one pass through the backbone. Batches with negatives are ranked among
    those, others among the catalogue.

    Args:
        backbone: The backbone, in evaluation mode.
        pinet: The same backbone with its heads, or None.
        batches: What to rank.
        on_batch: Called with the users done, for progress.
    """
    stages = ("backbone",) if pinet is None else ("backbone", "heads")
    ranks: dict[str, list[Tensor]] = {stage: [] for stage in stages}
    scores: dict[str, list[Tensor]] = {stage: [] for stage in stages}
    users, strata, targets = [], [], []
    num_negatives = None
    for block in batches:
        batch, candidates = block.batch, None
        if block.negatives is not None:
            candidates = torch.cat([block.targets.unsqueeze(1), block.negatives], 1)
            num_negatives = block.negatives.shape[1]
        states = backbone.serving_states(batch, candidates)
        for stage in stages:
            if stage == "heads":
                assert pinet is not None
                states = pinet.adapt(states, batch.strata.users)
            found = backbone.serving_scores(states, candidates)
            if candidates is not None:
                ranks[stage].append(candidate_ranks(found))
                scores[stage].append(found.float())
            else:
                args = (block.targets, block.history, block.history_offsets)
                ranks[stage].append(target_ranks(found, *args))
        users.append(block.users)
        strata.append(block.strata_ids)
        targets.append(block.targets)
        on_batch(len(block.users))
    return Ranking(
        _joined(users),
        _joined(strata),
        _joined(ranks["backbone"]),
        None if pinet is None else _joined(ranks["heads"]),
        _joined(targets),
        num_negatives,
        {} if num_negatives is None else {name: _candidates(scores[name]) for name in stages},
    )


def _candidates(parts: list[Tensor]) -> CandidateScores:
    joined = torch.cat(parts).cpu().numpy()
    return CandidateScores(joined[:, 0], joined[:, 1:])


def _joined(parts: list[Tensor]) -> npt.NDArray[np.int64]:
    if not parts:
        return np.empty(0, dtype=np.int64)
    joined: npt.NDArray[np.int64] = torch.cat(parts).cpu().numpy()
    return joined
