"""Padded twins of the ragged models, as anyone would write them: oracles only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from pinet_fast.data import RaggedBatch
    from pinet_fast.models import DIN, GRU4Rec, SASRec


def split(values: Tensor, offsets: Tensor) -> list[Tensor]:
    return list(values.split((offsets[1:] - offsets[:-1]).tolist()))


def padded_gru4rec(model: GRU4Rec, values: Tensor, offsets: Tensor) -> Tensor:
    """Return [T, d] by ``nn.GRU`` on right-padded sequences with the model's parameters."""
    dim, layers = model.dim, model.layers
    gru = nn.GRU(dim, dim, len(layers), batch_first=True).to(model.items.weight.dtype)
    state = {}
    for i, layer in enumerate(layers):
        state[f"weight_ih_l{i}"] = layer.of_input.weight
        state[f"bias_ih_l{i}"] = layer.of_input.bias
        state[f"weight_hh_l{i}"] = layer.of_hidden.weight
        state[f"bias_hh_l{i}"] = layer.of_hidden.bias
    parts = split(values, offsets)
    padded = pad_sequence(parts, batch_first=True)
    out = torch.func.functional_call(gru, state, (model.items(padded),))[0]
    return torch.cat([row[: len(p)] for row, p in zip(out, parts, strict=True)])


def padded_sasrec(model: SASRec, values: Tensor, offsets: Tensor) -> Tensor:
    """Return [T, d] from left-padded sequences and masked dense attention, pre- or post-norm."""
    parts = split(values, offsets)
    length = max(len(p) for p in parts)
    rows = torch.stack([nn.functional.pad(p, (length - len(p), 0)) for p in parts])
    position = torch.arange(length - 1, -1, -1)
    x = model.items(rows)
    if model.is_pre:
        x = x * model.dim**0.5 + model.positions(position)
    else:
        x = model.norm(x + model.positions(position))
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & (rows != 0).unsqueeze(1)
    allowed = allowed | torch.eye(length, dtype=torch.bool)  # padding looks at itself: no NaN
    for block in model.blocks:
        inner = block.attention_norm(x) if model.is_pre else x
        heads = block.num_heads
        q, k, v = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in block.qkv(inner).chunk(3, -1)
        )
        weights = q @ k.transpose(2, 3) / (model.dim / heads) ** 0.5
        weights = weights.masked_fill(~allowed.unsqueeze(1), -torch.inf).softmax(-1)
        x = x + block.out((weights @ v).transpose(1, 2).flatten(2))
        if model.is_pre:
            x = x + block.down(torch.relu(block.up(block.feed_norm(x))))
        else:
            x = block.attention_norm(x)
            x = block.feed_norm(x + block.down(nn.functional.gelu(block.up(x))))
    if model.is_pre:
        x = model.norm(x)
    return torch.cat([row[length - len(p) :] for row, p in zip(x, parts, strict=True)])


def din_by_hand(model: DIN, batch: RaggedBatch, items: Tensor, *, per_user: bool) -> Tensor:
    """Return [N, K, m] as the formulas say, one candidate and one event at a time."""

    def embed(item: int) -> Tensor:
        row = model.items.weight[item]
        if model.categories is None:
            return row
        own = [int(c) for c in model.item_categories[item] if c]
        mean = sum((model.categories.weight[c] for c in own), torch.zeros_like(row))
        return torch.cat([row, mean / max(len(own), 1)])

    starts, ends = batch.offsets[:-1].tolist(), batch.offsets[1:].tolist()
    spans = list(zip(starts, ends, strict=True))
    if not per_user:
        spans = [(a, t + 1) for a, b in spans for t in range(a, b)]
    states = []
    for (start, end), row in zip(spans, items.tolist(), strict=True):
        history = [embed(i) for i in batch.values[start:end].tolist()]
        for item in row:
            candidate = embed(item)
            pooled = torch.zeros_like(candidate)
            for event in history:
                weight: Tensor | float = 1 / len(history)
                if model.pooling == "attention":
                    unit = model.unit_event(event) + model.unit_candidate(candidate)
                    unit = torch.sigmoid(unit + model.unit_product(event * candidate))
                    weight = model.unit_out(unit)
                pooled = pooled + weight * event
            x = torch.cat([pooled, candidate, pooled * candidate])
            for layer in model.layers:
                x = layer(x)
                x = x * torch.sigmoid(x)
            states.append(x)
    out = torch.stack(states) if states else torch.zeros(0, model.state_dim).double()
    return out.view(*items.shape, model.state_dim)
