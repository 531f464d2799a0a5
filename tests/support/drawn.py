"""Models of blocks that a property test chooses, over rows and users of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import pinet_fast
from support.lanes import per_row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from support.lanes import Batch

V, K = 11, 3

Block = "Callable[[Drawn, nn.Module, Tensor, Batch], Tensor]"


def _within_users(batch: Batch) -> Tensor:
    """Return for every row some row of the same user: as many as the batch has, by chance."""
    users = batch.users_of_rows()
    return torch.cat([(users == u).nonzero().flatten().flip(0) for u in users.unique().tolist()])


def _of_users(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    users = torch.tanh(layer(batch.numbers(batch.num_users, model.dim, dtype=model.dtype, salt=7)))
    return x + users[batch.users_of_rows()]


def _chosen(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    return layer(x[_within_users(batch)])


def _again(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    for _ in range(1 + (batch.seed % 4 == 3)):
        x = torch.tanh(layer(x))
    return x


def _some_batches(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    return layer(x) if batch.seed % 2 else x


def _masked(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    return layer(x) * (batch.numbers(batch.num_rows, 1, salt=3) > -1).to(model.dtype)


def _strided(model: Drawn, layer: Any, x: Tensor, batch: Batch) -> Tensor:
    return layer(torch.cat([x, -x], 1)[:, 1 : model.dim + 1])


def _column_major(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    return layer(x.t().contiguous().t()).t().contiguous().t()


def _views(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    return layer(x.unsqueeze(0).transpose(0, 1).reshape(-1, model.dim)).unsqueeze(1).squeeze(1)


def _without_gradient(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    with torch.no_grad():
        y = layer(x)
    return x + y


def _rows_alone(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    y = layer(x)
    with pinet_fast.aggregation.sharing.rows_alone():
        return x + torch.tanh(y) * 0.5


def _pool(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    with pinet_fast.shared():
        pool = torch.tanh(layer(model.items(batch.ids(V, 5, salt=9))))
    return x + (x @ pool.t()) @ pool


def _checkpointed(model: Drawn, layer: Any, x: Tensor, batch: Batch) -> Tensor:
    return checkpoint(lambda x: torch.tanh(layer(x)), x, use_reentrant=False)  # type: ignore[no-any-return]


def _autocast(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x).to(model.dtype)


def _frozen(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    return F.linear(x, model.frozen)


def _derived(model: Drawn, layer: Any, x: Tensor, batch: Batch) -> Tensor:
    return F.linear(x, layer.weight.tanh(), layer.bias)


def _tied(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    return F.linear(x, model.items.weight).softmax(1) @ model.items.weight


def _tied_transposed(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    return (x @ model.items.weight.T).softmax(1) @ model.items.weight.detach()


def _padded(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    return x + model.padded(batch.ids(V, batch.num_rows, salt=1))


def _looked_up(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    ids = batch.ids(V, batch.num_rows, K, salt=2)
    return x + torch.embedding(model.items.weight, ids, 1).mean(1)


def _positions(model: Drawn, layer: Any, x: Tensor, batch: Batch) -> Tensor:
    rows = model.items(batch.ids(V, batch.num_rows, K, salt=5)) + layer.weight
    return x + (rows * layer.weight).mean(1)


def _gates(model: Drawn, layer: Any, x: Tensor, batch: Batch) -> Tensor:
    rows = model.items(batch.ids(V, batch.num_rows, K, salt=6)) * layer.weight
    return x + (rows + x.unsqueeze(1) + layer.weight).mean(1)


def _leaf(model: Drawn, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    given = batch.numbers(batch.num_rows, model.dim, dtype=model.dtype, salt=4)
    return x + layer(given.requires_grad_())


BLOCKS: dict[str, tuple[str, Block]] = {
    # name: (the layer it has, what it does)
    "linear": ("linear", lambda m, f, x, b: f(x)),
    "linear without bias": ("plain", lambda m, f, x, b: F.relu(f(x))),
    "in place": ("linear", lambda m, f, x, b: f(x).relu_()),
    "norm": ("norm", lambda m, f, x, b: f(x)),
    "norm of torch": (
        "norm",
        lambda m, f, x, b: torch.layer_norm(x, (m.dim,), f.weight, f.bias, f.eps),
    ),
    "norm without bias": ("plain norm", lambda m, f, x, b: f(x)),
    "residual": ("linear", lambda m, f, x, b: x + F.gelu(f(x))),
    "residual in front": ("linear", lambda m, f, x, b: F.gelu(f(x)) + x * 2),
    "dropout": ("linear", lambda m, f, x, b: F.dropout(f(x), 0.3)),
    "twice": ("linear", lambda m, f, x, b: f(torch.tanh(f(x)))),
    "norm twice": ("norm", lambda m, f, x, b: f(x + f(x))),
    "scale": ("scale", lambda m, f, x, b: x * f.weight),
    "scale first": ("scale", lambda m, f, x, b: torch.mul(f.weight, x)),
    "shift": ("scale", lambda m, f, x, b: x + f.weight),
    "shift first": ("scale", lambda m, f, x, b: f.weight.add(x)),
    "shift by a row": ("row", lambda m, f, x, b: x + f.weight),
    "shift and scale": ("scale", lambda m, f, x, b: (x + f.weight) * f.weight),
    "strided scale": ("scale", lambda m, f, x, b: _strided(m, lambda y: y * f.weight, x, b)),
    "scale in some batches": ("scale", lambda m, f, x, b: x * f.weight if b.seed % 2 else x),
    "checkpointed scale": ("scale", lambda m, f, x, b: _checkpointed(m, f.weight.mul, x, b)),
    "number": ("number", lambda m, f, x, b: x * f.weight + f.weight),
    "positions": ("positions", _positions),
    "gates": ("scale", _gates),
    "weight norm": ("weight norm", lambda m, f, x, b: f(x)),
    "again": ("linear", _again),
    "in some batches": ("linear", _some_batches),
    "norm in some batches": ("norm", _some_batches),
    "masked": ("linear", _masked),
    "strided": ("linear", _strided),
    "strided norm": ("norm", _strided),
    "column-major": ("plain", _column_major),
    "column-major norm": ("norm", _column_major),
    "views": ("linear", _views),
    "of users": ("linear", _of_users),
    "chosen": ("linear", _chosen),
    "without gradient": ("linear", _without_gradient),
    "rows alone": ("linear", _rows_alone),
    "pool": ("linear", _pool),
    "checkpointed": ("linear", _checkpointed),
    "autocast": ("linear", _autocast),
    "frozen": ("none", _frozen),
    "derived": ("linear", _derived),
    "tied": ("none", _tied),
    "tied transposed": ("none", _tied_transposed),
    "padded": ("none", _padded),
    "looked up": ("none", _looked_up),
    "leaf": ("linear", _leaf),
}

STARTS = {
    "looked up": lambda m, b: m.items(b.ids(V, b.num_rows)),
    "bags": lambda m, b: m.items(b.ids(V, b.num_rows, K)).sum(1),
    "padded bags": lambda m, b: m.padded(b.ids(V, b.num_rows, K)).sum(1),
    "numbers": lambda m, b: b.numbers(b.num_rows, m.dim, dtype=m.dtype),
    "column-major": lambda m, b: b.numbers(m.dim, b.num_rows, dtype=m.dtype).t(),
}


class Drawn(nn.Module):
    """A start and some blocks over rows [N, dim], and a last layer."""

    def __init__(self, start: str, blocks: Sequence[str], dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dim, self.dtype, self.start, self.blocks = dim, dtype, start, blocks
        self.items = nn.Embedding(V, dim)
        self.padded = nn.Embedding(V, dim, padding_idx=-1)
        self.register_buffer("frozen", torch.randn(dim, dim))
        self.layers = nn.ModuleList([self._layer(BLOCKS[name][0]) for name in blocks])
        self.last = nn.Linear(dim, 2)
        self.to(dtype)

    def _layer(self, kind: str) -> nn.Module:
        dim = self.dim
        if kind in ("norm", "plain norm"):
            return nn.LayerNorm(dim, bias=kind == "norm")
        if kind == "weight norm":
            return weight_norm(nn.Linear(dim, dim))
        if kind == "scale":
            return nn.LayerNorm(dim, bias=False)
        if kind == "number":
            return nn.PReLU()  # for its weight alone
        if kind in ("row", "positions"):
            return nn.Linear(dim, K if kind == "positions" else 1, bias=False)
        return nn.Identity() if kind == "none" else nn.Linear(dim, dim, bias=kind == "linear")

    def forward(self, batch: Batch) -> Tensor:
        x = STARTS[self.start](self, batch)
        for name, layer in zip(self.blocks, self.layers, strict=True):
            x = BLOCKS[name][1](self, layer, x, batch)
        return per_row(self.last(x))
