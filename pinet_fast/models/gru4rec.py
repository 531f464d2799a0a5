"""GRU4Rec on ragged batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pinet_fast.errors import ConfigError
from pinet_fast.models.dropout import Dropout
from pinet_fast.models.ragged_gru import RaggedGRU, StepPlan
from pinet_fast.models.sequence import SequenceModel


class GRU4Rec(SequenceModel):
    """A recurrent network over a user's events, whose states score the items.

    Deviations from the paper: a user's window is one sequence from a zero state (the paper chains
    sessions by parallel mini-batches and carries states over), an item table before the first
    layer (the paper's one-hot input is the same with d equal to the layer's width), items scored
    by a product with a table, tied or not, without biases, negatives drawn by the loader instead
    of taken from the batch (which would mix users), and losses beside the paper's BPR and TOP1.

    Args:
        num_items: V; ids run from 1 to V, 0 is padding and stays untrained.
        max_len: Longest window; states do not depend on it, it is there for who cuts windows.
        dim: d, width of items and states.
        num_layers: GRU layers.
        dropout: Dropout on embeddings and on the output of every layer.
        loss: A name of ``pinet_fast.models.losses``.
        tied: Whether items are scored by the rows they are read with.
        gbce_t: Calibration of the loss ``"gbce"``.

    Raises:
        ConfigError: Sizes or names out of range.

    Source:
        Hidasi et al., Session-based Recommendations with Recurrent Neural Networks, ICLR 2016,
        arXiv 1511.06939.
    """

    def __init__(
        self,
        num_items: int,
        *,
        max_len: int = 50,
        dim: int = 64,
        num_layers: int = 1,
        dropout: float = 0.2,
        loss: str = "ce",
        tied: bool = True,
        gbce_t: float = 0.75,
    ) -> None:
        super().__init__(num_items, max_len=max_len, dim=dim, loss=loss, tied=tied, gbce_t=gbce_t)
        if num_layers < 1:
            raise ConfigError(f"num_layers: expected a number >= 1, got {num_layers}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(RaggedGRU(dim, dim) for _ in range(num_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: N(0, 1 / d) for tables; U(-1/sqrt(d), 1/sqrt(d)) for gates.

        Smaller rows leave the gates where they are, and with losses on few negatives training
        then stalls for hundreds of steps.
        """
        bound = self.dim**-0.5
        for p in self.layers.parameters():
            nn.init.uniform_(p, -bound, bound)
        for table in (self.items,) if self.outputs is None else (self.items, self.outputs):
            nn.init.normal_(table.weight, std=bound)
            with torch.no_grad():
                table.weight[0].zero_()

    def states(self, items: Tensor, offsets: Tensor) -> Tensor:
        """Return the state after every event.

        Args:
            items: Rows of the item table for all users' windows, [T, d].
            offsets: Row offsets of the users, int64 [B + 1].

        Returns:
            [T, d].
        """
        x: Tensor = self.dropout(items)
        plan = StepPlan(offsets)
        for layer in self.layers:
            x = self.dropout(layer(x, plan))
        return x
