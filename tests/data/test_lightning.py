"""A Lightning trainer around the loader: its state is in the checkpoint, epochs follow on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pinet_fast.data import Negatives, RaggedLoader, Split, Strata, StratifiedBatchSampler

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's and its dependencies' own
lightning = pytest.importorskip("lightning.pytorch", minversion="2.4")  # written against 2.6.6

ModelCheckpoint = lightning.callbacks.ModelCheckpoint
SPLIT = Split.leave_one_out()
BATCHES = 7  # of an epoch


@pytest.fixture(scope="module")
def store(store_with_lengths):
    return store_with_lengths(np.random.default_rng(4).integers(4, 15, 26).tolist(), num_items=90)


class Model(lightning.LightningModule):
    """Scores items by a table, and writes down what it sees."""

    def __init__(self, num_items):
        super().__init__()
        self.table = torch.nn.Embedding(num_items + 1, 4)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((batch.users.tolist(), batch.values.tolist(), batch.negatives.tolist()))
        return self.table(batch.values).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(store, folder, threads, checkpoint=None):
    """Train for two epochs, with a checkpoint after every step."""
    strata = Strata.by_activeness(store, split=SPLIT, edges=[6])
    loader = RaggedLoader(
        store, StratifiedBatchSampler(strata, batch_size=4, seed=2), split=SPLIT, strata=strata,
        max_len=5, negatives=Negatives(2), seed=2, threads=threads,
    )  # fmt: skip
    assert len(loader) == BATCHES
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
    )  # fmt: skip
    model = Model(store.num_items)
    with loader:
        trainer.fit(model, loader, ckpt_path=checkpoint)
    return model.seen


@pytest.mark.parametrize("threads", [0, 2])
def test_a_resumed_trainer_sees_the_rest_of_the_batches(store, tmp_path, threads):
    whole = fit(store, tmp_path / "whole", threads)
    assert len(whole) == 2 * BATCHES
    assert whole[:BATCHES] != whole[BATCHES:]
    for step in (1, BATCHES - 1, BATCHES, BATCHES + 2, 2 * BATCHES - 1):
        rest = fit(store, tmp_path / "rest", threads, tmp_path / "whole" / f"step={step}.ckpt")
        assert rest == whole[step:]
