"""The recipe that is written without the library: its rows, its evaluation, a whole small run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.published import padded

if TYPE_CHECKING:
    from pathlib import Path

ITEMS = 130  # 99 negatives have to be found beside a history


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.permutation(ITEMS)[: rng.integers(5, 60)] + 1 for _ in range(40)]


def test_rows_are_at_the_right() -> None:
    rows = [np.array([1, 2]), np.array([3, 4, 5])]
    assert padded.padded(rows).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_padding_changes_no_state() -> None:
    torch.manual_seed(0)
    model = padded.SASRec(ITEMS).eval()
    short, long = np.array([5, 6, 7]), np.arange(1, 41)
    together = model(padded.padded([short, long]))[:, -1]
    alone = torch.cat([model(padded.padded([row]))[:, -1] for row in (short, long)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("held_out", [1, 2])
def test_ranks_are_those_of_a_loop(held_out: int) -> None:
    torch.manual_seed(0)
    model, rows = padded.SASRec(ITEMS).eval(), sequences()
    found = padded.evaluate(model, rows, held_out, ITEMS)
    gains = []
    for row in rows:
        before, target = row[:-held_out], int(row[-held_out])
        state = model(padded.padded([before[-padded.LENGTH :]]))[0, -1]
        scores = (model.items.weight @ state).tolist()
        others = set(range(1, ITEMS + 1)) - set(before.tolist())
        rank = sum(scores[item] > scores[target] for item in others)
        gains.append(1 / np.log2(rank + 2) if rank < 10 else 0.0)
    assert found["full ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-9)


def test_a_run_trains_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sequences()
    users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    log, out = tmp_path / "log.parquet", tmp_path / "out.json"
    pq.write_table(pa.table({"user": users, "item": np.concatenate(rows)}), log)
    threads = torch.get_num_threads()
    try:
        assert padded.main([str(log), "--epochs", "3", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    losses = [float(line.split()[3][:-1]) for line in capsys.readouterr().out.splitlines()[:3]]
    assert losses[2] < losses[0]
    found = json.loads(out.read_text())
    assert 0 <= found["sampled ndcg@10"] <= 1
    assert 0 <= found["best_epoch"] < 3
