"""PINet: a backbone that all users share, and a plugin head for each stratum."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from pinet_fast.errors import StrataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.aggregation.strata_index import RowGroups
    from pinet_fast.data.batch import RaggedBatch
    from pinet_fast.heads import PluginHeads


class Backbone(Protocol):
    """What PINet needs of a sequential recommender; SASRec is one."""

    def hidden(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Return the state after every event, [T, d]."""

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores of the catalogue, [N, V + 1], for states [N, d]."""

    def event_losses(self, hidden: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the loss of every event, [T]."""


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

    def __init__(
        self, backbone: nn.Module, heads: PluginHeads, edges: Sequence[int] | None
    ) -> None:
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

    def hidden(self, batch: RaggedBatch) -> Tensor:
        """Return the heads' state after every event, [T, d]."""
        backbone: Backbone = self.backbone  # type: ignore[assignment]
        with torch.no_grad():
            states = backbone.hidden(batch.values, batch.offsets)
        groups = batch.strata.events
        if groups is None:
            raise StrataError(
                "PINet: the batch's strata carry no lengths; build them with lengths="
            )
        return self.adapt(states, groups)

    def adapt(self, states: Tensor, groups: RowGroups) -> Tensor:
        """Return the heads' output for backbone states [N, d] of rows grouped by stratum."""
        out: Tensor = self.heads(states, groups)
        return out

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Return the losses of a batch, one an event, [T]."""
        backbone: Backbone = self.backbone  # type: ignore[assignment]
        return backbone.event_losses(self.hidden(batch), batch)
