"""Training epochs of SASRec: ragged against padded loops, deconfounded against joint.

On amazon-beauty-5core (L = 50) and ml-1m (L = 200), with binary cross-entropy. Both sides are whole
loops: drawing users, cutting windows, negatives, forward, backward, Adam. Both train d = 64, two
blocks, one head, B = 128, one negative an event that the user has not had, dropout 0.2, on the same
users: those of the first 20 batches of our epoch (of 175 and 48 in all).

The padded loop is what one writes in PyTorch: sequences cut and padded in NumPy into [B, L], a
causal mask over right-padded rows, losses masked. Bucketed, the users of 20 batches are sorted by
length, and each batch is padded to its longest sequence; their order is random over 20 batches at
a time, where ours is random over all users. Ours steps with fused Adam, as the recipe does; the
padded loops with Adam as it comes, and bucketed once more with fused Adam.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pinet_fast import GradientAggregator
from pinet_fast.data import (
    Negatives,
    RaggedLoader,
    SequenceStore,
    Split,
    Strata,
    StratifiedBatchSampler,
    prepare,
)
from pinet_fast.models import SASRec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FOLDER = Path(os.environ.get("PINET_FAST_DATA") or Path(__file__).parents[2] / "shared" / "data")
LENGTHS = {"amazon-beauty-5core": 50, "ml-1m": 200}
BATCH, BATCHES, DIM, DROPOUT = 128, 20, 64, 0.2
LOOPS = {"padded": (False, False), "bucketed": (True, False), "bucketed, fused Adam": (True, True)}


class Block(nn.Module):
    """A pre-norm Transformer block on padded rows, the same as ours."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, d] for [B, L, d]."""
        q, k, v = self.qkv(self.attention_norm(x)).unsqueeze(1).chunk(3, -1)
        rate = DROPOUT if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x = x + self.dropout(self.out(attended.squeeze(1)))
        return x + self.dropout(self.down(self.dropout(F.relu(self.up(self.feed_norm(x))))))


class PaddedSASRec(nn.Module):
    """SASRec on right-padded rows; position 0 is the latest event, as in ours."""

    def __init__(self, num_items: int, max_len: int) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items + 1, DIM, padding_idx=0)
        self.positions = nn.Embedding(max_len, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.dropout = nn.LayerNorm(DIM), nn.Dropout(DROPOUT)

    def forward(self, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """Return the mean loss of the valid events of [B, L] items."""
        mask = items != 0
        position = (mask.sum(1, keepdim=True) - 1 - torch.arange(items.shape[1])).clamp_min(0)
        x = self.dropout(self.items(items) * DIM**0.5 + self.positions(position))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        positive = (x * self.items(targets)).sum(-1)
        negative = (x * self.items(negatives)).sum(-1)
        losses = F.softplus(-positive) + F.softplus(negative)
        return losses[mask].mean()


class PaddedLoop:
    """Cuts, pads and draws in NumPy; one call is one pass over given batches of users.

    Args:
        store: The log.
        max_len: L.
        bucketed: Whether users are sorted by length over all batches, and padded to the longest.
        fused: Whether Adam is the fused one.
    """

    def __init__(self, store: SequenceStore, max_len: int, *, bucketed: bool, fused: bool) -> None:
        self.max_len, self.bucketed, self.num_items = max_len, bucketed, store.num_items
        ends = Split.leave_one_out().train_ends(store)
        self.sequences = [
            np.asarray(store.items[a:b], dtype=np.int64)
            for a, b in zip(store.offsets[:-1], ends, strict=True)
        ]
        self.seen = [np.unique(s) for s in self.sequences]
        self.rng = np.random.default_rng(0)
        torch.manual_seed(0)
        self.model = PaddedSASRec(store.num_items, max_len)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=fused or None)

    def batch(self, users: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return items, targets and negatives of users, [B, L] each."""
        windows = [self.sequences[u][-self.max_len - 1 :] for u in users]
        width = max(len(w) for w in windows) - 1 if self.bucketed else self.max_len
        out = np.zeros((3, len(users), width), np.int64)
        for row, (user, window) in enumerate(zip(users, windows, strict=True)):
            n = len(window) - 1
            out[0, row, :n], out[1, row, :n] = window[:-1], window[1:]
            drawn = self.rng.integers(1, self.num_items + 1, n)
            while (taken := np.isin(drawn, self.seen[user])).any():
                drawn[taken] = self.rng.integers(1, self.num_items + 1, int(taken.sum()))
            out[2, row, :n] = drawn
        return tuple(torch.from_numpy(part) for part in out)  # type: ignore[return-value]

    def run(self, batches: Sequence[np.ndarray]) -> None:
        """Train on batches of users."""
        if self.bucketed:
            users = np.concatenate(batches)
            users = users[np.argsort([len(self.sequences[u]) for u in users], kind="stable")]
            batches = np.array_split(users, len(batches))
            batches = [batches[i] for i in self.rng.permutation(len(batches))]
        self.model.train()
        for users in batches:
            self.optimizer.zero_grad()
            self.model(*self.batch(users)).backward()
            self.optimizer.step()


class OurLoop:
    """The recipe's own step on the first batches of an epoch."""

    def __init__(self, store: SequenceStore, max_len: int, rule: str) -> None:
        split = Split.leave_one_out()
        strata = Strata.by_activeness(store, split=split, edges="head:0.2")
        sampler = StratifiedBatchSampler(strata, batch_size=BATCH, seed=0)
        self.loader = RaggedLoader(
            store, sampler, split=split, strata=strata, max_len=max_len, targets="next",
            negatives=Negatives(1),
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = SASRec(store.num_items, max_len=max_len, dim=DIM, dropout=DROPOUT, loss="bce")
        adam = torch.optim.Adam(self.model.parameters(), fused=True)
        self.optimizer = GradientAggregator(adam, rule)

    def users(self) -> list[np.ndarray]:
        """Return the users of the batches that ``run`` trains on."""
        return [self.loader.sampler.batch(0, step) for step in range(BATCHES)]

    def run(self) -> None:
        """Train on the first batches of epoch 0."""
        self.loader.set_epoch(0)
        self.model.train()
        for step, batch in enumerate(self.loader):
            self.optimizer.zero_grad()
            with self.optimizer.stratify(batch.strata):
                losses = self.model(batch)
            self.optimizer.backward(losses)
            self.optimizer.step()
            if step + 1 == BATCHES:
                break


@pytest.fixture(scope="module", params=LENGTHS)
def log(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SequenceStore, int]:
    path = FOLDER / f"{request.param}.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not there; PINET_FAST_DATA names the folder of the public logs")
    folder = tmp_path_factory.mktemp(str(request.param))
    return prepare(path, order="rows", store_dir=folder), LENGTHS[request.param]


def check_twin(ours: OurLoop, padded: PaddedLoop) -> None:
    """The padded model has our loss: what is timed is the same computation."""
    theirs = padded.model.eval()
    mine = ours.model.eval()
    theirs.load_state_dict(mine.state_dict())
    batch = next(iter(ours.loader))
    ours.loader.set_epoch(0)
    expected = mine(batch).mean()
    parts = [batch.to_padded(rows=r) for r in (batch.values, batch.targets, batch.negatives[:, 0])]
    torch.testing.assert_close(theirs(*parts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loop", LOOPS)
def test_epoch_against_padded(
    log: tuple[SequenceStore, int], loop: str, paired: Callable[..., Any], benchmark: Any
) -> None:
    """The ratio is theirs over ours: how many times faster ours is."""
    benchmark.group = "epoch"
    store, max_len = log
    ours = OurLoop(store, max_len, "joint")
    bucketed, fused = LOOPS[loop]
    padded = PaddedLoop(store, max_len, bucketed=bucketed, fused=fused)
    check_twin(ours, padded)
    users = ours.users()
    result = paired(lambda: padded.run(users), ours.run, rounds=5)
    assert result.ratio > 0


@pytest.mark.parametrize("rule", ["agreement", "balanced", "mgda"])
def test_deconfounded_epoch_over_joint(
    log: tuple[SequenceStore, int], rule: str, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "epoch"
    store, max_len = log
    joint, own = OurLoop(store, max_len, "joint"), OurLoop(store, max_len, rule)
    result = paired(own.run, joint.run, rounds=8)
    assert result.ratio > 0
    assert own.optimizer.report.leak == "proven"
