"""DIN on ragged batches: scores candidates by what each finds in the user's history."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast.errors import ConfigError
from pinet_fast.models.candidate_pairs import CandidatePairs
from pinet_fast.models.dropout import Dropout
from pinet_fast.models.losses import by_event

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.data.batch import RaggedBatch

PoolingName = Literal["attention", "mean"]
_CHUNK = 1024  # candidates scored at once where the whole catalogue is


class DIN(nn.Module):
    """Deep Interest Network: the history is pooled anew for each candidate.

    A candidate's history is the user's events up to the one it follows; each event weighs by a
    small network on (event, candidate, their product), without a softmax, and a multi-layer
    network on (pooled history, candidate, their product) gives the score, plus a bias of the item.
    Training is binary cross-entropy of the target and its negatives.

    Deviations from the paper: the difference of event and candidate is no input of the activation
    unit, since a linear layer on both holds it already; sigmoid and SiLU instead of Dice (SiLU is
    Dice with alpha = 0 and without batch statistics, which would mix users); the product of pooled
    history and candidate as a further input (as in the authors' code); no user profile and context
    features; categories, where given, as the mean of their rows beside the item's own row.

    Args:
        num_items: V; ids run from 1 to V, 0 is padding and stays untrained.
        max_len: Longest history; nothing here depends on it.
        dim: d of the item rows, and of the category rows.
        unit: Width of the activation unit.
        layers: Widths of the network on top; the last one is that of the states.
        dropout: Dropout on the pooled input of that network.
        categories: Categories of every item, int64 [V + 1, C], from 1, 0 for none; None for items
            without categories.
        pooling: ``"attention"``, or ``"mean"``: the plain mean of the history, a baseline.

    Raises:
        ConfigError: Sizes, names or categories out of range.

    Source:
        Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018,
        arXiv 1706.06978.
    """

    item_categories: Tensor

    def __init__(
        self,
        num_items: int,
        *,
        max_len: int = 50,
        dim: int = 32,
        unit: int = 36,
        layers: Sequence[int] = (80, 40),
        dropout: float = 0.0,
        categories: Tensor | None = None,
        pooling: PoolingName = "attention",
    ) -> None:
        super().__init__()
        if pooling not in get_args(PoolingName):
            raise ConfigError(f"pooling: expected 'attention' or 'mean', got {pooling!r}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        if not layers:
            raise ConfigError("layers: expected one width or more, got none")
        self.num_items, self.max_len, self.dim, self.pooling = num_items, max_len, dim, pooling
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=0)
        self.categories: nn.Embedding | None = None
        if categories is not None:
            self.register_buffer("item_categories", _checked(categories, num_items))
            num_categories = int(categories.max())
            self.categories = nn.Embedding(num_categories + 1, dim, padding_idx=0)
        width = dim * (1 if categories is None else 2)
        if pooling == "attention":
            self.unit_event = nn.Linear(width, unit)
            self.unit_candidate = nn.Linear(width, unit, bias=False)
            self.unit_product = nn.Linear(width, unit, bias=False)
            self.unit_out = nn.Linear(unit, 1)
        sizes = [3 * width, *layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(layers[-1], 1)
        self.bias = nn.Embedding(num_items + 1, 1, padding_idx=0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: N(0, 0.05) for tables, zero item biases, torch's elsewhere."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.05)
        with torch.no_grad():
            self.items.weight[0].zero_()
            self.bias.weight.zero_()
            if self.categories is not None:
                self.categories.weight[0].zero_()

    @property
    def state_dim(self) -> int:
        """Return the width of the states, for plugin heads."""
        return self.out.in_features

    @property
    def loss(self) -> str:
        """Return the name of the loss."""
        return "bce"

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Return the losses of a batch, one a target: [T], or [B] with one target a user."""
        return self.training_losses(self.training_states(batch), batch)

    def embed(self, items: Tensor) -> Tensor:
        """Return the rows of items of any shape, with their categories', [..., width]."""
        rows: Tensor = self.items(items)
        if self.categories is None:
            return rows
        ids = self.item_categories[items]
        count = (ids != 0).sum(-1, keepdim=True).clamp_min(1)
        return torch.cat([rows, self.categories(ids).sum(-2) / count], -1)

    def states(self, batch: RaggedBatch, candidates: Tensor, *, per_user: bool) -> Tensor:
        """Return the state of every candidate, [N, K, m].

        Args:
            batch: The histories.
            candidates: Items, int64 [N, K].
            per_user: Whether rows are users with all their events, N = B, or events with those of
                their user up to them, N = T.
        """
        events, rows = self.embed(batch.values), self.embed(candidates)
        pairs = CandidatePairs.of(batch.offsets, per_user=per_user)
        if self.pooling == "mean":
            pooled = pairs.mean(events).unsqueeze(1).expand_as(rows)
        else:
            pooled = pairs.total(self._weights(events, rows, pairs), events)
        x: Tensor = self.dropout(torch.cat([pooled, rows, pooled * rows], -1))
        for layer in self.layers:
            x = F.silu(layer(x))
        return x

    def _weights(self, events: Tensor, rows: Tensor, pairs: CandidatePairs) -> Tensor:
        """Return how much each event counts for each candidate that follows it, [P, K, 1]."""
        product = events[pairs.event].unsqueeze(1) * rows[pairs.row]
        unit = self.unit_product(product) + self.unit_candidate(rows)[pairs.row]
        unit = torch.sigmoid(unit + self.unit_event(events)[pairs.event].unsqueeze(1))
        weights: Tensor = self.unit_out(unit)
        return weights

    def logits(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Return scores [N, K] for states [N, K, m] of items [N, K]; sigmoid gives P(click)."""
        scores: Tensor = (self.out(states) + self.bias(candidates)).squeeze(-1)
        return scores

    # What PINet and the evaluation ask of any model, see ``pinet_fast.models.pinet.Backbone``.

    def training_states(self, batch: RaggedBatch) -> Tensor:
        """Return the states of the target and its negatives, [N, 1 + n, m], N = T or B."""
        candidates = self._candidates(batch)
        return self.states(batch, candidates, per_user=len(candidates) != batch.num_events)

    def training_losses(self, states: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the loss of every target, [N]: its own and the mean of its negatives', summed."""
        logits = self.logits(states, self._candidates(batch))
        return F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).mean(1)

    def _candidates(self, batch: RaggedBatch) -> Tensor:
        if batch.targets is None or batch.negatives is None:
            raise ConfigError(
                "DIN: the loss needs batch.targets and batch.negatives; use targets= and "
                "negatives=Negatives()"
            )
        negatives = batch.negatives
        if len(batch.targets) == batch.num_events:
            negatives = by_event(negatives, batch)
        elif negatives.dim() == 1:
            negatives = negatives.expand(batch.num_users, -1)
        return torch.cat([batch.targets.unsqueeze(1), negatives], 1)

    def serving_states(self, batch: RaggedBatch, candidates: Tensor | None = None) -> Tensor:
        """Return the state of every user's candidates, [B, K, m]; without them, of all items."""
        if candidates is not None:
            return self.states(batch, candidates, per_user=True)
        everything = torch.arange(self.num_items + 1, device=batch.values.device)
        parts = torch.split(everything, _CHUNK)
        rows = (part.expand(batch.num_users, -1) for part in parts)
        return torch.cat([self.states(batch, part, per_user=True) for part in rows], 1)

    def serving_scores(self, states: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return the scores of candidates, [B, K]; without them of the catalogue, [B, V + 1]."""
        if candidates is not None:
            return self.logits(states, candidates)
        everything = torch.arange(self.num_items + 1, device=states.device)
        scores = self.logits(states, everything.expand(len(states), -1))
        scores[:, 0] = -torch.inf
        return scores


def _checked(categories: Tensor, num_items: int) -> Tensor:
    expected = categories.dim() == 2 and len(categories) == num_items + 1 and categories.shape[1]
    if not expected or categories.dtype != torch.int64 or int(categories.min()) < 0:
        raise ConfigError(
            f"categories: expected int64 [{num_items + 1}, C] of numbers >= 0, got "
            f"{categories.dtype} {list(categories.shape)}"
        )
    return categories
