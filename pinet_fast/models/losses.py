"""Losses of next-event prediction, one a row; every sequence model takes any of them.

Each is written twice: as a function of scores, and by name in :class:`EventLoss`, which asks a
model's item table for the scores that the loss needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.sharing import rows_alone
from pinet_fast.aggregation.strata_index import repeat_rows
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from pinet_fast.data.batch import RaggedBatch

LossName = Literal["ce", "bce", "ss", "bpr", "gbce"]

LOSSES: tuple[str, ...] = get_args(LossName)
"""Names of the losses: softmax over the catalogue, then four on sampled negatives."""


class ItemScores(Protocol):
    """What a loss asks of a model: scores of items for states."""

    num_items: int

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores of the catalogue, [N, V + 1], for states [N, d]."""

    def candidate_scores(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Return the scores of each row's own items [N, n], [N, n]."""

    def pool_scores(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Return the scores of items that belong to no row, [n], for states [N, d], [N, n]."""


def binary_cross_entropy(positive: Tensor, negatives: Tensor) -> Tensor:
    """Return ``-log sigmoid(s+) - sum_j log(1 - sigmoid(s_j))``, [N].

    Args:
        positive: Scores of the targets, [N].
        negatives: Scores of their negatives, [N, n].

    Source:
        SASRec, arXiv 1808.09781, equation 7, with n = 1.
    """
    return F.softplus(-positive) + F.softplus(negatives).sum(1)


def bayesian_personalised_ranking(positive: Tensor, negatives: Tensor) -> Tensor:
    """Return ``mean_j -log sigmoid(s+ - s_j)``, [N].

    Args:
        positive: Scores of the targets, [N].
        negatives: Scores of their negatives, [N, n]; with n = 1 this is the paper's loss.

    Source:
        BPR, arXiv 1205.2618.
    """
    return F.softplus(negatives - positive.unsqueeze(1)).mean(1)


def sampled_softmax(
    positive: Tensor, negatives: Tensor, log_q: Tensor, is_target: Tensor | None = None
) -> Tensor:
    """Return ``-s+ + log(exp(s+) + (1 / n) sum_j exp(s_j) / q_j)``, [N].

    The sum under the logarithm is an unbiased estimate of the softmax's over the target and every
    item that may be drawn; the target itself is no draw, so its score has no correction.

    Args:
        positive: Scores of the targets, [N].
        negatives: Scores of their negatives, [N, n].
        log_q: Log-probability of each negative in one draw, of a shape that broadcasts to [N, n].
        is_target: Where a negative is the row's target, bool [N, n]; those are left out. None
            where no negative ever is.

    Source:
        Bengio and Senecal 2003 (importance-weighted estimate of the partition function); the
        correction is the log-q of Yi et al., RecSys 2019, doi 10.1145/3298689.3346996.
    """
    corrected = negatives - (log_q + torch.log(log_q.new_tensor(float(negatives.shape[1]))))
    if is_target is not None:
        corrected = corrected.masked_fill(is_target, -torch.inf)
    return torch.logsumexp(torch.cat([positive.unsqueeze(1), corrected], 1), 1) - positive


def generalised_bce(positive: Tensor, negatives: Tensor, power: float) -> Tensor:
    """Return ``-power * log sigmoid(s+) - sum_j log(1 - sigmoid(s_j))``, [N].

    Args:
        positive: Scores of the targets, [N].
        negatives: Scores of their negatives, [N, n].
        power: beta, as :func:`gbce_power` gives it.

    Source:
        gSASRec, arXiv 2308.07192, equation 11.
    """
    return power * F.softplus(-positive) + F.softplus(negatives).sum(1)


def gbce_power(num_items: int, num_negatives: int, calibration: float) -> float:
    """Return the beta of gBCE, ``a (t (1 - 1 / a) + 1 / a)`` with ``a = n / (V - 1)``.

    Args:
        num_items: V.
        num_negatives: n.
        calibration: t: 0 gives plain binary cross-entropy (beta 1), 1 a fully calibrated model
            (beta = a).

    Source:
        gSASRec, arXiv 2308.07192, equation 13.
    """
    rate = min(num_negatives / max(num_items - 1, 1), 1.0)
    return rate * calibration * (1 - 1 / rate) + 1.0


class EventLoss:
    """A loss by its name.

    Args:
        name: ``"ce"``, ``"bce"``, ``"ss"``, ``"bpr"`` or ``"gbce"``.
        calibration: t of ``"gbce"``, 0 to 1.

    Raises:
        ConfigError: Another name, or t out of its range.
    """

    def __init__(self, name: str, calibration: float = 0.75) -> None:
        if name not in LOSSES:
            raise ConfigError(f"loss: expected one of {', '.join(LOSSES)}; got {name!r}")
        if not 0 <= calibration <= 1:
            raise ConfigError(f"gbce_t: expected 0 <= t <= 1, got {calibration}")
        self.name = name
        self.calibration = calibration

    def __call__(self, table: ItemScores, hidden: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the loss of every event, [T], from its state [T, d].

        Raises:
            ConfigError: The batch lacks what the loss needs.
        """
        items = self.candidates(batch)
        if items is not None:
            return self.of_scores(table.candidate_scores(hidden, items), table, batch)
        with rows_alone():
            targets = event_targets(batch)
        if self.name == "ce":
            return F.cross_entropy(table.scores(hidden), targets, reduction="none")
        others = table.pool_scores(hidden, self._drawn(batch))
        positive = table.candidate_scores(hidden, targets.unsqueeze(1)).squeeze(1)
        with rows_alone():
            return self._of_parts(table, positive, others, targets, batch)

    def candidates(self, batch: RaggedBatch) -> Tensor | None:
        """Return the items that are scored for each event, its target first, int64 [T, 1 + n].

        None where all events are scored on the same items: the catalogue, or a pool.

        Raises:
            ConfigError: The batch lacks what the loss needs.
        """
        if self.name == "ce":
            return None
        negatives = self._drawn(batch)
        if negatives.dim() == 1:
            return None
        with rows_alone():
            targets = event_targets(batch).unsqueeze(1)
            return torch.cat([targets, by_event(negatives, batch)], 1)

    def of_scores(self, scores: Tensor, table: ItemScores, batch: RaggedBatch) -> Tensor:
        """Return the loss of every event, [T], from the scores of its candidates, [T, 1 + n]."""
        with rows_alone():
            targets = event_targets(batch)
            return self._of_parts(table, scores[:, 0], scores[:, 1:], targets, batch)

    def _of_parts(
        self,
        table: ItemScores,
        positive: Tensor,
        others: Tensor,
        targets: Tensor,
        batch: RaggedBatch,
    ) -> Tensor:
        """Return the losses, [T], of scores of targets, [T], and of negatives, [T, n]."""
        if self.name == "bce":
            return binary_cross_entropy(positive, others)
        if self.name == "bpr":
            return bayesian_personalised_ranking(positive, others)
        if self.name == "gbce":
            power = gbce_power(table.num_items, others.shape[1], self.calibration)
            return generalised_bce(positive, others, power)
        if batch.negatives_log_q is None:
            raise ConfigError(
                'loss: "ss" needs batch.negatives_log_q; use negatives=Negatives(log_q=True)'
            )
        log_q = by_event(batch.negatives_log_q, batch)
        is_target = by_event(self._drawn(batch), batch) == targets.unsqueeze(1)
        return sampled_softmax(positive, others, log_q, is_target)

    def _drawn(self, batch: RaggedBatch) -> Tensor:
        if batch.negatives is None:
            raise ConfigError(
                f'loss: "{self.name}" needs batch.negatives; use negatives=Negatives()'
            )
        return batch.negatives


def event_targets(batch: RaggedBatch) -> Tensor:
    """Return the target of every event, int64 [T].

    Raises:
        ConfigError: The batch has none, or one a user.
    """
    if batch.targets is None or len(batch.targets) != batch.num_events:
        raise ConfigError(
            f"loss: expected batch.targets of {batch.num_events} events, got "
            f'{None if batch.targets is None else list(batch.targets.shape)}; use targets="next"'
        )
    return batch.targets


def by_event(drawn: Tensor, batch: RaggedBatch) -> Tensor:
    """Return what belongs to the negatives of every event, [T, n], from [T, n], [B, n] or [n].

    Ids are repeated, not embeddings: so every looked-up row is one of the batch's events, which is
    what stratum gradients need.

    Raises:
        ConfigError: Another shape.
    """
    if drawn.dim() == 1:
        return drawn.expand(batch.num_events, -1)
    if drawn.dim() == 2 and len(drawn) == batch.num_events:
        return drawn
    if drawn.dim() == 2 and len(drawn) == batch.num_users:
        return repeat_rows(drawn, batch.lengths)
    raise ConfigError(
        f"loss: expected negatives per event [{batch.num_events}, n], user "
        f"[{batch.num_users}, n] or batch [n], got shape {list(drawn.shape)}"
    )
