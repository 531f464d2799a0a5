"""Batches from a store, relative to copying the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pinet_fast import RaggedLoader, Split, Strata, StratifiedBatchSampler, prepare
from pinet_fast.data import simulate_log

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_ragged_batch_over_memcpy(
    tmp_path: Path, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "data"
    log = simulate_log(tmp_path / "log.parquet", users=6000, items=1500)
    store = prepare(log, store_dir=tmp_path)
    split = Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")
    sampler = StratifiedBatchSampler(strata, batch_size=256)
    loader = RaggedLoader(store, sampler, split=split, strata=strata, max_len=50)
    drawn = list(loader)
    assert sum(b.num_users for b in drawn) == store.num_users
    assert all(bool((b.values > 0).all()) for b in drawn)
    source = np.concatenate([b.values.numpy() for b in drawn])
    target = np.empty_like(source)
    paired(lambda: list(loader), lambda: np.copyto(target, source), rounds=20)
