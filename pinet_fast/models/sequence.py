"""What sequence models share: the item table, scores, losses, and states to predict from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast.aggregation.sharing import rows_alone, shared
from pinet_fast.models.layers import Embedding
from pinet_fast.models.losses import EventLoss

if TYPE_CHECKING:
    from pinet_fast.data.batch import RaggedBatch


class SequenceModel(nn.Module):
    """A model that turns every event into a state [d], whose product with an item's row scores it.

    Args:
        num_items: V; ids run from 1 to V, 0 is padding and stays untrained.
        max_len: Longest window.
        dim: d.
        loss: A name of ``pinet_fast.models.losses``.
        tied: Whether items that are scored have the rows of items that are read; False gives them
            a table of their own, ``outputs``.
        gbce_t: Calibration of the loss ``"gbce"``.

    Raises:
        ConfigError: An unknown loss, or a calibration out of its range.
    """

    padding_bias: Tensor
    _looks_up_once = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A forward goes past these, so not where a subclass has ideas of its own about them.
        passed = (
            "hidden",
            "event_losses",
            "training_states",
            "training_losses",
            "candidate_scores",
        )
        cls._looks_up_once = all(getattr(cls, n) is getattr(SequenceModel, n) for n in passed)

    def __init__(
        self,
        num_items: int,
        *,
        max_len: int,
        dim: int,
        loss: str,
        tied: bool,
        gbce_t: float,
    ) -> None:
        super().__init__()
        self.event_loss = EventLoss(loss, gbce_t)
        self.num_items = num_items
        self.max_len = max_len
        self.dim = dim
        self.items = Embedding(num_items + 1, dim, padding_idx=0)
        self.outputs = None if tied else Embedding(num_items + 1, dim, padding_idx=0)
        # -inf for item 0 as a bias costs no pass over the [T, V + 1] logits of its own, and leaves
        # exactly zero gradient in the padding row.
        bias = torch.zeros(num_items + 1)
        bias[0] = -torch.inf
        self.register_buffer("padding_bias", bias, persistent=False)

    @property
    def loss(self) -> str:
        """Return the name of the loss."""
        return self.event_loss.name

    @property
    def state_dim(self) -> int:
        """Return the width of the states, for plugin heads."""
        return self.dim

    @property
    def scored(self) -> nn.Embedding:
        """Return the table of the items that are scored."""
        return self.items if self.outputs is None else self.outputs

    def reset_parameters(self) -> None:
        """Draw all parameters anew: N(0, 0.02) for tables and matrices, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        with torch.no_grad():
            self.items.weight[0].zero_()
            self.scored.weight[0].zero_()

    def states(self, items: Tensor, offsets: Tensor) -> Tensor:
        """Return the state after every event.

        Args:
            items: Rows of the item table for all users' windows, [T, d].
            offsets: Row offsets of the users, int64 [B + 1]; no window longer than ``max_len``.

        Returns:
            [T, d].
        """
        raise NotImplementedError(f"{type(self).__name__}: implement states(items, offsets)")

    def hidden(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Return the state after every event.

        Args:
            values: Item ids of all users' windows, int64 [T].
            offsets: Row offsets of the users, int64 [B + 1]; no window longer than ``max_len``.

        Returns:
            [T, d].
        """
        return self.states(self.items(values), offsets)

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores of the whole catalogue, [N, V + 1], for states [N, d]; padding -inf."""
        return F.linear(hidden, self.scored.weight, self.padding_bias)

    def candidate_scores(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Return the scores of each row's own items, [N, n], for states [N, d] and ids [N, n]."""
        return _products(self.scored(items), hidden)

    def pool_scores(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Return the scores of a pool of items, [N, n], for states [N, d] and ids [n].

        One product with the n rows of the pool, instead of N n lookups.
        """
        with shared():
            pool = self.scored(items)
        return F.linear(hidden, pool)

    def event_losses(self, hidden: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the loss of every event, [T], from its state [T, d].

        Raises:
            ConfigError: The batch lacks what the loss needs.
        """
        return self.event_loss(self, hidden, batch)

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Return the losses of a batch, one an event, [T]."""
        is_once = self._looks_up_once and self.outputs is None
        candidates = self.event_loss.candidates(batch) if is_once else None
        if candidates is None:
            return self.training_losses(self.training_states(batch), batch)
        # One lookup of what is read and what is scored: the backward of two makes two gradients of
        # the whole table and adds them.
        with rows_alone():
            ids = torch.cat([batch.values.unsqueeze(1), candidates], 1)
        rows = self.items(ids)
        with rows_alone():
            read, scored = rows.split_with_sizes([1, candidates.shape[1]], 1)
            read = read.squeeze(1)
        scores = _products(scored, self.states(read, batch.offsets))
        return self.event_loss.of_scores(scores, self, batch)

    # What PINet and the evaluation ask of any model, see ``pinet_fast.models.pinet.Backbone``.

    def training_states(self, batch: RaggedBatch) -> Tensor:
        """Return the state after every event, [T, d]."""
        return self.hidden(batch.values, batch.offsets)

    def training_losses(self, states: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the loss of every event, [T]."""
        return self.event_losses(states, batch)

    def serving_states(self, batch: RaggedBatch, candidates: Tensor | None = None) -> Tensor:
        """Return the state after the last event of every user, [B, d], whatever the candidates."""
        return self.hidden(batch.values, batch.offsets)[batch.offsets[1:] - 1]

    def serving_scores(self, states: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return the scores of candidates, [B, K]; without them of the catalogue, [B, V + 1].

        Args:
            states: From ``serving_states``, [B, d].
            candidates: Items, int64 [B, K], or None.
        """
        return (
            self.scores(states) if candidates is None else self.candidate_scores(states, candidates)
        )


def _products(rows: Tensor, hidden: Tensor) -> Tensor:
    """Return the products of states [N, d] with rows of their own, [N, n, d], as [N, n]."""
    with rows_alone():
        scores: Tensor = (rows * hidden.unsqueeze(1)).sum(-1)
    return scores
