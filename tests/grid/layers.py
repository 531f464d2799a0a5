"""Layers of sequential recommenders, as small modules with one interface.

Each maps [B, L, D] values or [B, L] item ids to [B, L, width] ([L, B, ...] when made time-major).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

D = 4
NUM_ITEMS = 6
MAX_LENGTH = 8


class Tied(nn.Module):
    """Full softmax over the table that embedded the items, in three spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, D, padding_idx=0)
        self.spelling = spelling

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.items(ids))
        if self.spelling == ".T":
            return hidden @ self.items.weight.T
        if self.spelling == ".t()":
            return hidden @ self.items.weight.t()
        return F.linear(hidden, self.items.weight)


class Recurrent(nn.Module):
    """All states of nn.GRU or nn.LSTM."""

    def __init__(self, kind: type[nn.GRU | nn.LSTM], time_major: bool, dropout: float) -> None:
        super().__init__()
        layers = 2 if dropout else 1
        self.rnn = kind(D, D, num_layers=layers, dropout=dropout, batch_first=not time_major)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, time_major: bool, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, dropout, batch_first=not time_major)
        self.dim = 0 if time_major else 1

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[self.dim]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        out: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return out


class Convolution(nn.Module):
    """A convolution over time."""

    def __init__(self, time_major: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)
        self.time_major = time_major

    def forward(self, x: Tensor) -> Tensor:
        if self.time_major:
            return self.conv(x.permute(1, 2, 0)).permute(2, 0, 1)
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Positions(nn.Module):
    """Learned positions, a bare parameter: added by broadcasting, or indexed on ragged rows."""

    def __init__(self, time_major: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(MAX_LENGTH, D))
        self.time_major = time_major

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        if places is not None:
            return torch.tanh(x + self.table[places])
        if self.time_major:
            return torch.tanh(x + self.table[: x.shape[0]].unsqueeze(1))
        return torch.tanh(x + self.table[: x.shape[1]])


class ClassToken(nn.Module):
    """A learned token in front of every sequence: a parameter that becomes rows."""

    def __init__(self, time_major: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.dim = 0 if time_major else 1

    def forward(self, x: Tensor) -> Tensor:
        users = x.shape[1 - self.dim]
        token = self.token.expand(users, -1, -1)
        if self.dim == 0:
            token = token.transpose(0, 1)
        whole = torch.tanh(torch.cat([token, x], dim=self.dim).cumsum(self.dim))
        return whole.narrow(self.dim, 1, x.shape[self.dim])


@dataclass(frozen=True)
class Layer:
    """One row of the grid.

    Attributes:
        make: Takes ``time_major`` and ``dropout``; returns the module.
        takes: ``"values"`` [B, L, D] or item ``"ids"`` [B, L].
        width: Size of the last dimension of the output.
        sequence: Needs whole sequences: neither ragged rows nor a single item serve.
        sliced: May use the slice rule.
        traced: Compiled, it runs as a graph inside ``stratify``; the others run eagerly there.
        bf16: Relative error allowed in bf16, of the whole model or under autocast: about twice what
            plain autograd itself differs by under autocast, over 20 seeds, when a stratum's
            gradient is summed user by user in float32. Whole models in bf16 stay within it by a
            factor of 1.5 over 20 seeds.
    """

    make: Callable[[bool, float], nn.Module]
    takes: str = "values"
    width: int = D
    sequence: bool = False
    sliced: bool = False
    traced: bool = True
    bf16: float = 2e-2


def _same(make: Callable[[], nn.Module]) -> Callable[[bool, float], nn.Module]:
    return lambda time_major, dropout: make()


def _tied(spelling: str) -> Layer:
    return Layer(_same(lambda: Tied(spelling)), takes="ids", width=NUM_ITEMS + 1, bf16=3e-2)


def _table(**options: Any) -> Callable[[bool, float], nn.Module]:
    return _same(lambda: nn.Embedding(NUM_ITEMS + 1, D, **options))


def _encoder(time_major: bool, dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 6, dropout=dropout, batch_first=not time_major)


LAYERS: dict[str, Layer] = {
    "linear": Layer(_same(lambda: nn.Linear(D, D))),
    "embedding padded": Layer(_table(padding_idx=0), takes="ids", bf16=5e-2),
    "embedding sparse": Layer(_table(sparse=True), takes="ids", bf16=5e-2),
    "tied .T": _tied(".T"),
    "tied .t()": _tied(".t()"),
    "tied F.linear": _tied("F.linear"),
    "layer_norm": Layer(_same(lambda: nn.LayerNorm(D))),
    "GRU": Layer(lambda t, p: Recurrent(nn.GRU, t, p), sequence=True, traced=False, bf16=3e-2),
    "LSTM": Layer(lambda t, p: Recurrent(nn.LSTM, t, p), sequence=True, traced=False, bf16=3e-2),
    "MHA": Layer(Attention, sequence=True, bf16=3e-2),
    "TransformerEncoderLayer": Layer(_encoder, sequence=True, bf16=3e-2),
    "conv1d": Layer(lambda t, p: Convolution(t), sequence=True, traced=False),
    "position added": Layer(lambda t, p: Positions(t), sliced=True),
    "CLS token": Layer(
        lambda t, p: ClassToken(t), sequence=True, sliced=True, traced=False, bf16=4e-2
    ),
    "weight-normed": Layer(
        _same(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D))), sliced=True
    ),
    "PReLU": Layer(_same(nn.PReLU), sliced=True, traced=False),
}
"""``sliced`` is allowed where the promise "no slice rule" was not made, not expected there."""
