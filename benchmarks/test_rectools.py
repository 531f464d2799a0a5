"""Three epochs of ours beside three of RecTools, each in a process of its own, taking turns.

RecTools prepares its data at every call; three epochs make that a smaller part of its time.

RecTools' pins conflict with this project's, so it needs an environment of its own:

    python -m venv .venv-rectools
    .venv-rectools/bin/pip install 'rectools[torch]==0.19.0' torch==2.13.0
    PINET_FAST_RECTOOLS=.venv-rectools/bin/python pytest benchmarks/test_rectools.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch

from pinet_fast import (
    GradientAggregator,
    Negatives,
    RaggedLoader,
    SASRec,
    Split,
    Strata,
    StratifiedBatchSampler,
    prepare,
)
from pinet_fast.data import simulate_log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPTIONS = {"dim": 64, "max_len": 50, "batch_size": 128, "threads": 1, "epochs": 3}
WORKER = Path(__file__).with_name("rectools_worker.py")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return simulate_log(tmp_path / "log.parquet", users=3000, items=1500)


@pytest.fixture
def rectools(log: Path) -> Iterator[Callable[[], float]]:
    """Return what trains in RecTools' process and waits for it."""
    interpreter = os.environ.get("PINET_FAST_RECTOOLS")
    if not interpreter:
        pytest.skip("PINET_FAST_RECTOOLS names no interpreter that has RecTools")
    as_csv = log.with_suffix(".csv")
    pa_csv.write_csv(pq.read_table(log), as_csv)
    command = [interpreter, str(WORKER), str(as_csv), json.dumps(OPTIONS)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        answer = process.stdout.readline()
        if not answer:
            pytest.skip(f"RecTools does not run: {process.stderr.read().splitlines()[-1]}")
        assert json.loads(answer)["users"] == 3000

        def epochs() -> float:
            print(file=process.stdin, flush=True)
            return float(json.loads(process.stdout.readline())["seconds"])  # type: ignore[union-attr]

        yield epochs
        process.stdin.close()


def test_epoch_over_rectools(
    log: Path,
    rectools: Callable[[], float],
    tmp_path: Path,
    paired: Callable[..., Any],
    benchmark: Any,
) -> None:
    """Both train SASRec on one negative an event; ours aggregates the gradients of two strata."""
    benchmark.group = "epoch"
    store, split = prepare(log, store_dir=tmp_path), Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")
    loader = RaggedLoader(
        store, StratifiedBatchSampler(strata, batch_size=OPTIONS["batch_size"]), split=split,
        strata=strata, max_len=OPTIONS["max_len"], negatives=Negatives(1),
    )  # fmt: skip
    model = SASRec(
        store.num_items, max_len=OPTIONS["max_len"], dim=OPTIONS["dim"], loss="bce", dropout=0.2
    )
    opt = GradientAggregator(torch.optim.Adam(model.parameters()), "agreement")
    losses_seen: list[float] = []

    def epoch() -> None:
        total, events = 0.0, 0
        for batch in loader:
            opt.zero_grad()
            with opt.stratify(batch.strata):
                losses = model(batch)
            opt.backward(losses)
            opt.step()
            total, events = total + float(losses.detach().sum()), events + batch.num_events
        losses_seen.append(total / events)

    threads = torch.get_num_threads()
    torch.set_num_threads(OPTIONS["threads"])
    try:
        paired(lambda: [epoch() for _ in range(OPTIONS["epochs"])], rectools, rounds=3)
    finally:
        torch.set_num_threads(threads)
    assert losses_seen[-1] < losses_seen[0]
