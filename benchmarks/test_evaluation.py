"""Full-catalogue evaluation of 22,363 users x 12,101 items against the bare product and top-k.

The candidate is all of it: reading histories, the model's forward, scores, masks, ranks. The
reference multiplies states that are there already with the item table, and takes the best 20.
Both are timed on the same 4,096 users, in the same blocks; a whole evaluation has 5.5 times as
many.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pinet_fast.data import Split, Strata, evaluation_batches, prepare, simulate_log
from pinet_fast.models import GRU4Rec, SASRec
from pinet_fast.training.evaluate import rank_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pinet_fast.data import EvaluationBatch

USERS, ITEMS, BLOCK, TIMED = 22_363, 12_101, 512, 4096


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Iterator[EvaluationBatch]]:
    folder: Path = tmp_path_factory.mktemp("evaluation")
    log = simulate_log(folder / "log.parquet", users=USERS, items=ITEMS, seed=0)
    store = prepare(log, store_dir=folder)
    split = Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")

    def first() -> Iterator[EvaluationBatch]:
        batches = evaluation_batches(
            store, split=split, strata=strata, max_len=50, batch_size=BLOCK
        )
        return islice(batches, TIMED // BLOCK)

    return first


@pytest.mark.parametrize("make", [SASRec, GRU4Rec])
def test_full_catalogue_evaluation(
    make: Any, blocks: Any, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "evaluation"
    model = make(ITEMS, max_len=50, dim=64).eval()
    with torch.no_grad():
        states = [model.serving_states(block.batch) for block in blocks()]

    def evaluate() -> None:
        rank_targets(model, None, blocks())

    @torch.no_grad()
    def bare() -> None:
        for part in states:
            (part @ model.items.weight.t()).topk(20, dim=1)

    # What is timed is right: the ranks of one block, by sorting each user's scores.
    block = next(blocks())
    got = rank_targets(model, None, [block]).backbone
    with torch.no_grad():
        scores = model.scores(states[0])
    for user in range(0, BLOCK, 37):
        target = int(block.targets[user])
        low, high = block.history_offsets[user : user + 2].tolist()
        row = scores[user].clone()
        row[[i for i in block.history[low:high].tolist() if i != target]] = -torch.inf
        assert int((row >= row[target]).sum()) == got[user]

    result = paired(evaluate, bare, rounds=15)
    if not benchmark.disabled:
        assert result.ratio < 3
