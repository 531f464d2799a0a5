"""A Lightning module with manual optimization: scheduler, clipping and accumulation as before.

Lightning's own optimizer wrapper calls ``step`` with a closure, which GradientAggregator refuses;
``use_pl_optimizer=False`` hands out the optimizer itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pinet_fast import GradientAggregator

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's and its dependencies' own
lightning = pytest.importorskip("lightning.pytorch", minversion="2.4")  # written against 2.6.6

NUM_ITEMS, LENGTH, USERS = 30, 6, 192


class Recommender(lightning.LightningModule):  # type: ignore[name-defined, misc]
    """A GRU over padded ids, next item by full softmax, micro-batches accumulated by two."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.items = nn.Embedding(NUM_ITEMS + 1, 16, padding_idx=0)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.seen: list[Tensor] = []
        self.modes: list[str] = []

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> None:
        ids, targets, strata = batch
        opt: Any = self.optimizers(use_pl_optimizer=False)  # 1
        with opt.stratify(strata, num_strata=2, reduction="mean"):  # 2
            states = self.gru(self.items(ids))[0][:, -1]
            loss = F.cross_entropy(states @ self.items.weight.T, targets)
            self.manual_backward(loss / 2)
        self.seen.append(loss.detach())
        self.modes.append(opt.report.mode)
        if index % 2 == 1:
            self.clip_gradients(opt, gradient_clip_val=5.0, gradient_clip_algorithm="norm")
            opt.step()
            opt.zero_grad()

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def configure_optimizers(self) -> dict[str, Any]:
        opt = torch.optim.Adam(self.parameters(), lr=0.02)
        opt = GradientAggregator(opt, "mgda")  # 3
        return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)}


def test_module_learns(tmp_path: Any) -> None:
    torch.manual_seed(0)
    strata = (torch.rand(USERS) < 0.3).long()
    start = torch.randint(1, 12, (USERS, 1))
    rows = start + torch.arange(LENGTH + 1) * (1 + strata[:, None])
    data = TensorDataset(rows[:, :-1], rows[:, -1], strata)
    model = Recommender()
    trainer = lightning.Trainer(
        max_epochs=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    opt = model.optimizers(use_pl_optimizer=False)
    assert isinstance(opt, GradientAggregator)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.02 * 0.9**12)
    assert set(model.modes) == {"one-pass"}
    first, last = torch.stack(model.seen[:6]).mean(), torch.stack(model.seen[-6:]).mean()
    assert last < 0.5 * first
    state = opt.state_dict()
    opt.load_state_dict(state)
