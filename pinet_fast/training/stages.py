"""The two stages of the recipe: the shared backbone, then plugin heads on it.

Both run the same loop; they differ in what is trained and in which epoch is kept. Stage 1 keeps the
epoch with the best validation NDCG@10 (GAUC where targets are ranked among negatives) over all
users, or over the stratum that is watched. Stage 2 keeps, for each stratum apart, the epoch best
for its users; untrained heads, which are the identity, take part as epoch 0, so that a head that
does not help is not used.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pinet_fast.aggregation.strata_index import repeat_rows
from pinet_fast.errors import ConfigError
from pinet_fast.training.metrics import mean_metric

if TYPE_CHECKING:
    import numpy as np

    from pinet_fast.aggregation import GradientAggregator
    from pinet_fast.data import RaggedBatch, RaggedLoader, Strata
    from pinet_fast.models import PINet
    from pinet_fast.training.config import RunConfig
    from pinet_fast.training.evaluate import Ranking


class Stage:
    """A stage: what is trained, how far it got, and what is kept.

    Args:
        name: ``backbone`` or ``heads``.
        module: Called with a batch, it returns one loss an event.
        trained: The module whose parameters are trained and kept.
        optimizer: Aggregates and steps.
        loader: The batches.
        epochs: Most epochs.
        patience: Evaluations without improvement that end the stage; 0 = never.
        is_weighted: Whether losses weigh by ``batch.weights``, where the batch has any.
    """

    def __init__(
        self,
        name: str,
        *,
        module: nn.Module,
        trained: nn.Module,
        optimizer: GradientAggregator,
        loader: RaggedLoader,
        epochs: int,
        patience: int = 0,
        is_weighted: bool = True,
        watched: int | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.trained = trained
        self.optimizer = optimizer
        self.loader = loader
        self.epochs = epochs
        self.patience = patience
        self.is_weighted = is_weighted
        self.watched = watched
        self.epoch = 0  # epochs completed
        self.step = 0
        self.seconds = 0.0
        self.events = 0
        self.loss_sum = 0.0  # of the epoch under way
        self.loss_events = 0
        self.evaluations_since_best = 0
        self.best_scores: list[float] = []
        self.best_epochs: list[int] = []
        self.best_state: dict[str, Tensor] = {}

    def is_finished(self) -> bool:
        """Return whether no epoch is left to train."""
        stalled = 0 < self.patience <= self.evaluations_since_best
        return self.epoch >= self.epochs or stalled

    def train_step(self, batch: RaggedBatch) -> float:
        """Run one aggregated step; return the mean loss of the batch's events."""
        self.module.train()
        self.optimizer.zero_grad()
        with self.optimizer.stratify(batch.strata):
            losses = self.module(batch)
        self.optimizer.backward(losses, self._row_weights(batch))
        self.optimizer.step()
        loss_sum = float(losses.detach().sum())
        self.step += 1
        self.loss_sum += loss_sum
        self.loss_events += losses.numel()
        self.events += losses.numel()
        return loss_sum / int(losses.numel())

    def _row_weights(self, batch: RaggedBatch) -> Tensor | None:
        """Return the weight of every loss, that of its user, or None where all are 1."""
        if batch.weights is None or not self.is_weighted:
            return None
        if batch.targets is not None and len(batch.targets) == batch.num_users:
            return batch.weights
        return repeat_rows(batch.weights, batch.lengths)

    def scores(self, ranking: Ranking) -> list[float]:
        """Return what decides which epoch is kept, one number a separately kept part."""
        ranks = ranking.backbone
        if self.watched is not None:
            ranks = ranks[ranking.strata == self.watched]
        return [ranking.quality(ranks)]

    def keep(self, part: int) -> None:
        """Keep the present parameters of a part."""
        self.best_state = copy.deepcopy(self.trained.state_dict())

    def judge(self, ranking: Ranking) -> None:
        """Compare an evaluation with the best so far, and keep what is better."""
        scores = self.scores(ranking)
        if not self.best_scores:
            self.best_scores = [-1.0] * len(scores)
            self.best_epochs = [0] * len(scores)
        improved = False
        for part, score in enumerate(scores):
            if score > self.best_scores[part]:
                self.best_scores[part], self.best_epochs[part] = score, self.epoch
                self.keep(part)
                improved = True
        self.evaluations_since_best = 0 if improved else self.evaluations_since_best + 1

    def restore_best(self) -> None:
        """Put the kept parameters into the trained module."""
        if self.best_state:
            self.trained.load_state_dict(self.best_state)

    _COUNTERS = (
        "epoch", "step", "seconds", "events", "loss_sum", "loss_events",
        "evaluations_since_best", "best_scores", "best_epochs", "best_state",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on."""
        return {
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            **{name: getattr(self, name) for name in self._COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        for name in self._COUNTERS:
            setattr(self, name, state[name])


class HeadStage(Stage):
    """Stage 2: every stratum's head is kept at the epoch best for that stratum."""

    def __init__(self, pinet: PINet, **options: Any) -> None:
        super().__init__("heads", module=pinet, trained=pinet.heads, **options)
        self.num_strata = pinet.heads.num_strata

    def scores(self, ranking: Ranking) -> list[float]:
        """Return what decides the epoch of every stratum's head."""
        assert ranking.heads is not None
        strata = range(self.num_strata)
        return [ranking.quality(ranking.heads[ranking.strata == s]) for s in strata]

    @torch.no_grad()
    def keep(self, part: int) -> None:
        """Keep the present head of one stratum; parameters are stacked by stratum."""
        for name, value in self.trained.state_dict().items():
            kept = self.best_state.setdefault(name, value.clone())
            kept[part] = value[part]


def epoch_scores(ranking: Ranking, num_strata: int, use_heads: bool) -> dict[str, Any]:
    """Return the validation part of an epoch's log record."""
    ranks = ranking.heads if use_heads and ranking.heads is not None else ranking.backbone

    def group(chosen: np.ndarray[Any, Any]) -> dict[str, float | None]:
        if not len(chosen):
            return {"ndcg@10": None, "hr@10": None}
        return {"ndcg@10": mean_metric(chosen), "hr@10": mean_metric(chosen, "hr")}

    strata = [group(ranks[ranking.strata == s]) for s in range(num_strata)]
    return {"overall": group(ranks), "strata": strata}


def watched_stratum(config: RunConfig, strata: Strata) -> int | None:
    """Return the stratum of ``--stop-on``, or None for all users.

    Raises:
        ConfigError: No stratum has that name.
    """
    if config.stop_on == "overall":
        return None
    if config.stop_on not in strata.names:
        raise ConfigError(
            f"--stop-on: expected overall or one of {', '.join(strata.names)}; got "
            f"{config.stop_on!r}"
        )
    return strata.names.index(config.stop_on)
