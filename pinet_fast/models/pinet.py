"""PINet: a backbone that all users share, and a plugin head for each stratum."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast.aggregation.strata_index import StrataIndex
from pinet_fast.errors import ConfigError, StrataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.aggregation.strata_index import RowGroups
    from pinet_fast.data.batch import RaggedBatch
    from pinet_fast.heads.base import Heads


class Backbone(Protocol):
    """What PINet and the evaluation need of a recommender; SASRec, GRU4Rec and DIN are some.

    States are what plugin heads adapt: rows of the batch first, [N, m] or, where each candidate
    has its own, [N, K, m].
    """

    num_items: int
    max_len: int

    @property
    def state_dim(self) -> int:
        """Return m."""

    def training_states(self, batch: RaggedBatch) -> Tensor:
        """Return the states that the losses are made from; N is T or B."""

    def training_losses(self, states: Tensor, batch: RaggedBatch) -> Tensor:
        """Return one loss a row, [N]."""

    def serving_states(self, batch: RaggedBatch, candidates: Tensor | None = None) -> Tensor:
        """Return the states after every user's last event, N = B.

        Args:
            batch: The histories.
            candidates: Items to be scored, int64 [B, K]; None for the whole catalogue.
        """

    def serving_scores(self, states: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return the scores of the candidates, [B, K], or of the catalogue, [B, V + 1]."""


class PINet(nn.Module):
    """A frozen backbone with plugin heads on its states.

    Args:
        backbone: The trained backbone. It is frozen here: in evaluation mode, without gradients.
        heads: One head a stratum.
        edges: Lower activeness bounds of strata 1 to S - 1, ascending; kept in the state dict, so
            that a loaded model routes users as in training. None, or empty, for strata from
            labels: ``route`` then refuses, and users come with their stratum.

    Raises:
        StrataError: Another number of edges, or edges that do not ascend.

    Source:
        arXiv 2208.09130.
    """

    edges: Tensor

    def __init__(self, backbone: nn.Module, heads: Heads, edges: Sequence[int] | None) -> None:
        super().__init__()
        edges = [] if edges is None else list(edges)
        if edges and len(edges) != heads.num_strata - 1:
            raise StrataError(
                f"PINet: {heads.num_strata} heads need {heads.num_strata - 1} edges, got "
                f"{len(edges)}; give those of the strata, or None for strata from labels"
            )
        if any(low >= high for low, high in itertools.pairwise(edges)):
            raise StrataError(f"PINet: expected ascending edges, got {edges}; sort them")
        self.backbone = backbone
        self.heads = heads
        self.register_buffer("edges", torch.tensor(edges, dtype=torch.int64))
        backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> PINet:
        """Set the mode of the heads; the frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def route(self, activeness: Tensor) -> Tensor:
        """Return the stratum of users by their number of training events, int64 [B].

        Args:
            activeness: Numbers of training events, integers [B].

        Raises:
            StrataError: The strata are those of labels, which activeness does not tell.
        """
        if len(self.edges) == 0 and self.heads.num_strata > 1:
            raise StrataError(
                f"PINet: the {self.heads.num_strata} strata are made from labels, so activeness "
                "does not tell the stratum of a user; look the label up and pass the strata of the "
                "batch yourself (StrataIndex(ids, num_strata))"
            )
        return torch.searchsorted(self.edges, activeness, right=True)

    def adapt(self, states: Tensor, groups: RowGroups) -> Tensor:
        """Return the heads' output for backbone states of rows grouped by stratum.

        Args:
            states: [N, m], or [N, K, m] where every row has K states.
            groups: The N rows.
        """
        rows = states.flatten(0, -2)
        repeats = states.shape[1] if states.dim() == 3 else 1
        out: Tensor = self.heads(rows, groups.repeated(repeats))
        return out.view_as(states)

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Return the losses of a batch, one a row of the backbone's states, [N].

        Raises:
            StrataError: The batch's strata carry no lengths, and the states are those of events.
        """
        backbone: Backbone = self.backbone  # type: ignore[assignment]
        with torch.no_grad():
            states = backbone.training_states(batch)
        groups = batch.strata.users
        if len(states) != groups.num_rows:
            if batch.strata.events is None:
                raise StrataError(
                    "PINet: the batch's strata carry no lengths; build them with lengths="
                )
            groups = batch.strata.events
        return backbone.training_losses(self.adapt(states, groups), batch)

    @torch.no_grad()
    def scores(self, batch: RaggedBatch, candidates: Tensor | None = None) -> Tensor:
        """Return the scores of the catalogue, [B, V + 1], or of candidates, [B, K].

        Args:
            batch: The histories, with the strata of their users.
            candidates: Items, int64 [B, K], or None.
        """
        backbone: Backbone = self.backbone  # type: ignore[assignment]
        states = self.adapt(backbone.serving_states(batch, candidates), batch.strata.users)
        return backbone.serving_scores(states, candidates)

    def topk(
        self,
        histories: Sequence[Sequence[int]],
        k: int,
        *,
        strata: Sequence[int] | None = None,
        include_history: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the best items for users, known or not, by their histories.

        Args:
            histories: Item codes of each user, oldest first, one or more each; the last
                ``max_len`` are read.
            k: Items a user, at most V.
            strata: The users' strata; None routes every user by the length of the history, which
                is what an unseen user has.
            include_history: Whether items of the history may be recommended again.

        Returns:
            Items, int64 [B, k], and their scores [B, k], best first. A user whose history leaves
            fewer than k items has score -inf at the end.

        Raises:
            ConfigError: ``k`` or an item out of range, or a user without history.
            StrataError: The strata are those of labels, and none are given; or of another number.
        """
        backbone: Backbone = self.backbone  # type: ignore[assignment]
        if not 1 <= k <= backbone.num_items:
            raise ConfigError(f"topk: expected 1 <= k <= {backbone.num_items}, got {k}")
        was_training = self.training
        self.eval()
        try:
            batch = self._serving_batch(histories, strata)
            scores = self.scores(batch)
        finally:
            self.train(was_training)
        scores[:, 0] = -torch.inf
        if not include_history:
            for row, history in zip(scores, histories, strict=True):
                row[torch.tensor(history, device=row.device)] = -torch.inf
        best = scores.topk(k, dim=1)
        return best.indices, best.values

    def _serving_batch(
        self, histories: Sequence[Sequence[int]], strata: Sequence[int] | None
    ) -> RaggedBatch:
        from pinet_fast.data.batch import RaggedBatch

        backbone: Backbone = self.backbone  # type: ignore[assignment]
        device, num_items = self.edges.device, backbone.num_items
        for user, history in enumerate(histories):
            if not history or min(history) < 1 or max(history) > num_items:
                raise ConfigError(
                    f"topk: expected item codes 1 to {num_items} as the history of user {user}, "
                    f"got {list(history)[:5]}; look codes up with SequenceStore.item_code"
                )
        activeness = torch.tensor([len(h) for h in histories], dtype=torch.int64, device=device)
        ids = self.route(activeness) if strata is None else torch.tensor(strata, device=device)
        shown = [list(h[-backbone.max_len :]) for h in histories]
        lengths = torch.tensor([len(h) for h in shown], dtype=torch.int64)
        if len(ids) != len(histories):
            raise StrataError(f"topk: expected {len(histories)} strata, got {len(ids)}")
        values = torch.tensor([item for h in shown for item in h], dtype=torch.int64)
        return RaggedBatch(
            values=values.to(device),
            offsets=F.pad(lengths.cumsum(0), (1, 0)).to(device),
            strata=StrataIndex(ids, self.heads.num_strata, lengths.to(device)),
            users=torch.arange(len(histories), device=device),
            targets=None,
            negatives=None,
            max_len=max(map(len, shown), default=0),
        )
