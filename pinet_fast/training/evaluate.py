"""Full-catalogue ranking of held-out events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pinet_fast.aggregation.strata_index import repeat_rows
from pinet_fast.errors import AggregationError

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
    """

    users: npt.NDArray[np.int64]
    strata: npt.NDArray[np.int64]
    backbone: npt.NDArray[np.int64]
    heads: npt.NDArray[np.int64] | None


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
    if not bool(own.isfinite().all()):
        raise AggregationError(
            "evaluation: scores are not finite: the model has diverged; lower the learning rate"
        )
    rows = repeat_rows(torch.arange(len(targets), device=scores.device), offsets.diff())
    scores[:, 0] = -torch.inf
    scores[rows, history] = -torch.inf
    scores.scatter_(1, column, own)
    # The target itself is among those that are not below it: rank 1 means nobody else is.
    return (scores >= own).sum(1)


@torch.no_grad()
def rank_targets(
    backbone: Backbone,
    pinet: PINet | None,
    batches: Iterable[EvaluationBatch],
    on_batch: Callable[[int], None] = lambda users: None,
) -> Ranking:
    """Rank the targets of all batches with the backbone and, where given, the plugin heads.

    Both are ranked from one pass through the backbone.

    Args:
        backbone: The backbone, in evaluation mode.
        pinet: The same backbone with its heads, or None.
        batches: What to rank.
        on_batch: Called with the users done, for progress.
    """
    users, strata, plain, headed = [], [], [], []
    for block in batches:
        batch = block.batch
        states = backbone.hidden(batch.values, batch.offsets)[batch.offsets[1:] - 1]
        args = (block.targets, block.history, block.history_offsets)
        plain.append(target_ranks(backbone.scores(states), *args))
        if pinet is not None:
            adapted = pinet.adapt(states, batch.strata.users)
            headed.append(target_ranks(backbone.scores(adapted), *args))
        users.append(block.users)
        strata.append(block.strata_ids)
        on_batch(len(block.users))
    return Ranking(
        _joined(users), _joined(strata), _joined(plain), _joined(headed) if headed else None
    )


def _joined(parts: list[Tensor]) -> npt.NDArray[np.int64]:
    if not parts:
        return np.empty(0, dtype=np.int64)
    joined: npt.NDArray[np.int64] = torch.cat(parts).cpu().numpy()
    return joined
