"""What the situations put around a layer: models that return one loss a user or an event."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from grid.layers import Layer


class Net(nn.Module):
    """The layer and a head; forward returns squared scores [B, L] (or of the rows given)."""

    def __init__(self, layer: Layer, *, time_major: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = layer.make(time_major, dropout)
        self.head = nn.Linear(layer.width, 2)
        self.time_major = time_major

    def scores(self, out: Tensor) -> Tensor:
        """Return one number a row from [..., width]."""
        return torch.tanh(self.head(out)).pow(2).sum(-1)

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.scores(self.layer(*inputs))
        return out.transpose(0, 1) if self.time_major else out


class Twice(Net):
    """One layer, two calls, one after the other or on two inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        return self.scores(self.layer(x) - 0.5 * self.layer(x.flip(1)))


class Dropped(Net):
    """Dropout behind the layer (and inside it where it has some)."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.scores(F.dropout(self.layer(*inputs), 0.3))


class NormOnTimeMajor(Net):
    """The best-known SASRec port: transpose inside the model, LayerNorm on [L, B, d]."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer, time_major=True)
        self.norm = nn.LayerNorm(layer.width)

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.norm(self.layer(inputs[0].transpose(0, 1)))
        return self.scores(out.transpose(0, 1))


class Checkpointed(Net):
    """The layer recomputed in backward."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.scores(checkpoint(self.layer, *inputs, use_reentrant=False))


class BatchNormed(Net):
    """Batch statistics over the users' pooled states [B, width]; scores [B, 1]."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.norm = nn.BatchNorm1d(layer.width)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.scores(self.norm(self.layer(*inputs).sum(1))).unsqueeze(1)


class Extra(Net):
    """A branch that only some batches use."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.extra = nn.Linear(layer.width, layer.width)

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.layer(inputs[0])
        return self.scores(out + self.extra(out) if len(inputs) == 2 else out)


class InBatch(nn.Module):
    """A user tower and an item tower (the layer): every loss sees all users' items."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer.make(False, 0.0)
        self.user = nn.Linear(3, layer.width)
        self.pool: Callable[[], AbstractContextManager[object]] = nullcontext

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        with self.pool():
            candidates = self.layer(items)  # [B, width]: rows that belong to no user
        logits = self.user(users) @ candidates.T
        return F.cross_entropy(logits, torch.arange(len(users)), reduction="none")
