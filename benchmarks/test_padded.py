"""An aggregated step on ragged batches beside a plain step of the padded loop most people have.

Lengths follow the long tail of recommendation logs: most windows are far shorter than the longest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.test_step import LENGTH, NUM_ITEMS, USERS
from pinet_fast import GradientAggregator, RaggedBatch, SASRec, StrataIndex

if TYPE_CHECKING:
    from collections.abc import Callable


class PaddedSASRec(SASRec):
    """The same model as it is usually written: [B, L] on the left, a mask, a masked mean."""

    def padded_losses(self, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """Return the losses of all cells, [B, L]; those of padding mean nothing."""
        users, length = items.shape
        x = self.items(items) * self.dim**0.5 + self.positions.weight[:length].flip(0)
        x = self._drop(x)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        # A padded query sees itself, or its softmax would be over nothing.
        seen = causal & (items != 0).unsqueeze(1) | torch.eye(length, dtype=torch.bool)
        for block in self.blocks:
            qkv = block.qkv(block.attention_norm(x)).view(users, length, 3, -1)
            q, k, v = qkv.unbind(2)
            rate = self.dropout.p if self.training else 0.0
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=rate)
            x = x + self._drop(block.out(attended))
            inner = self._drop(F.relu(block.up(block.feed_norm(x))))
            x = x + self._drop(block.down(inner))
        x = self.norm(x)
        good = (x * self.items(targets)).sum(-1)
        bad = (x * self.items(negatives)).sum(-1)
        return F.softplus(-good) + F.softplus(bad)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout.p, self.training)


def long_tailed_batch(num_strata: int) -> RaggedBatch:
    """B = 128 users whose windows of at most 50 events follow a Pareto(1.1) law."""
    generator = torch.Generator().manual_seed(0)
    drawn = np.random.default_rng(0).pareto(1.1, USERS)
    lengths = torch.from_numpy(np.clip((drawn + 1) * 4, 2, LENGTH).astype(np.int64)).sort().values
    events = int(lengths.sum())

    def items(*shape: int) -> Tensor:
        return torch.randint(1, NUM_ITEMS + 1, shape, generator=generator)

    return RaggedBatch(
        values=items(events),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        strata=StrataIndex(torch.arange(USERS) * num_strata // USERS, num_strata, lengths),
        users=torch.arange(USERS),
        targets=items(events),
        negatives=items(events, 1),
        max_len=int(lengths.max()),
    )


def padded_on_the_left(batch: RaggedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return items, targets, negatives and the mask of real events, [B, L]."""
    column = torch.arange(LENGTH)
    mask = column >= LENGTH - batch.lengths.unsqueeze(1)

    def grid(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    assert batch.targets is not None
    assert batch.negatives is not None
    return grid(batch.values), grid(batch.targets), grid(batch.negatives.flatten()), mask


@pytest.mark.parametrize("rule", ["backdoor", "agreement"])
def test_ragged_step_over_padded_step(
    rule: str, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "padded"
    batch = long_tailed_batch(4)
    *data, mask = padded_on_the_left(batch)
    torch.manual_seed(0)
    plain = PaddedSASRec(NUM_ITEMS, max_len=LENGTH, loss="bce", dropout=0.2)
    model = SASRec(NUM_ITEMS, max_len=LENGTH, loss="bce", dropout=0.2)
    model.load_state_dict(plain.state_dict())
    plain_opt = torch.optim.Adam(plain.parameters())
    opt = GradientAggregator(torch.optim.Adam(model.parameters()), rule)

    def same_losses() -> None:
        theirs, ours = plain.eval().padded_losses(*data)[mask], model.eval()(batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        plain.train(), model.train()

    def padded() -> None:
        plain_opt.zero_grad()
        losses = plain.padded_losses(*data)
        ((losses * mask).sum() / mask.sum()).backward()
        plain_opt.step()

    def aggregated() -> None:
        opt.zero_grad()
        with opt.stratify(batch.strata):
            losses = model(batch)
        opt.backward(losses)
        opt.step()

    benchmark.extra_info["padding"] = 1 - float(mask.float().mean())
    paired(aggregated, padded, check=same_losses)
