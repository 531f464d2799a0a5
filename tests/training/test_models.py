"""Every model, loss and kind of heads runs end to end, resumes to the bit, and reports by rule."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs import StopAt, assert_same_run

from pinet_fast.data import Negatives, Split, evaluation_batches, prepare
from pinet_fast.errors import ConfigError, TrainingInterrupted
from pinet_fast.models.losses import LOSSES
from pinet_fast.training import RunConfig, train
from pinet_fast.training.building import BUILDERS
from pinet_fast.training.config import MODELS

if TYPE_CHECKING:
    from pathlib import Path

DIN: dict[str, Any] = {"model": "din", "loss": "bce", "eval_negatives": 20}
RUNS: list[dict[str, Any]] = [
    {"model": "gru4rec", "loss": "ss", "negatives": 3, "tied": False, "head": "gate"},
    {"model": "sasrec", "loss": "gbce", "negatives": 4, "gbce_t": 0.5, "norm": "post"},
    {"model": "sasrec", "loss": "bpr", "eval_negatives": 10, "head": "prediction"},
    {**DIN, "stop_on": "tail"},
    {**DIN, "model": "din-mean", "targets": "last", "mix": "uniform"},
]


@pytest.fixture
def quick(config: RunConfig) -> RunConfig:
    return replace(config, epochs=2, head_epochs=1)


@pytest.fixture(scope="session")
def categories(small_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write categories of the items of the small log, some without."""
    items = sorted(set(pq.read_table(small_log)["item"].to_pylist()))
    lists = [[] if i % 7 == 0 else [f"c{i % 5}", f"d{i % 3}"] for i in range(len(items))]
    path = tmp_path_factory.mktemp("items") / "items.parquet"
    pq.write_table(pa.table({"item": items, "attributes": lists}), path)
    return path


def test_every_name_has_a_builder() -> None:
    assert set(BUILDERS) == set(MODELS)


@pytest.mark.parametrize("options", RUNS, ids=lambda o: f"{o['model']}-{o['loss']}")
def test_resume_is_bit_identical_with_any_model(
    quick: RunConfig, tmp_path: Path, categories: Path, options: dict[str, Any]
) -> None:
    quick = replace(quick, **options)
    if quick.model == "din":
        quick = replace(quick, attributes=str(categories))
    train(quick, tmp_path / "whole")
    for step in (3, 10):
        broken = tmp_path / f"broken-{step}"
        with pytest.raises(TrainingInterrupted):
            train(quick, broken, observer=StopAt(step))
        train(None, broken, resume=True)
        assert_same_run(tmp_path / "whole", broken)


@pytest.fixture(scope="session")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a log in which every item has one successor, whatever the user."""
    rng = np.random.default_rng(0)
    order = np.random.default_rng(1).permutation(40)
    successor = dict(zip(order, np.roll(order, -1), strict=True))
    users, items = [], []
    for user in range(150):
        length, item = int(rng.integers(4, 10)), int(rng.integers(40))
        for _ in range(length):
            users.append(user)
            items.append(item)
            item = int(successor[item])
    path = tmp_path_factory.mktemp("chains") / "chains.parquet"
    pq.write_table(pa.table({"user": users, "item": items}), path)
    return path


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", ["sasrec", "gru4rec"])
def test_every_loss_learns_what_follows_what(
    chains: Path, tmp_path: Path, model: str, loss: str
) -> None:
    config = RunConfig(
        data=str(chains), model=model, loss=loss, rule="joint", heads=False, epochs=30,
        batch_size=32, max_len=10, dim=16, lr=0.02, dropout=0.0, patience=0, eval_every=5,
        order="rows", negatives=1 if loss == "ce" else 8, threads=1,
    )  # fmt: skip
    metrics = train(config, tmp_path / "run")
    assert metrics["baselines"]["popularity"]["ranking"]["overall"]["ndcg@10"]["mean"] < 0.15
    # gBCE holds the targets' gradient down, by a third here, and is slower for it.
    enough = 0.4 if loss == "gbce" else 0.85
    assert metrics["test"]["backbone"]["overall"]["ndcg@10"]["mean"] > enough


def test_din_reports_clicks(quick: RunConfig, tmp_path: Path, categories: Path) -> None:
    config = replace(quick, **DIN, attributes=str(categories), epochs=8, lr=0.01)
    metrics = train(config, tmp_path / "run")
    own, popular = metrics["clicks"]["test"], metrics["baselines"]["popularity"]["clicks"]
    assert set(own) == {"backbone", "heads"}
    for stage in own.values():
        assert len(stage["strata"]) == 2
        for group in (stage["overall"], *stage["strata"]):
            assert 0 <= group["gauc"]["low"] <= group["gauc"]["mean"] <= group["gauc"]["high"] <= 1
    assert own["backbone"]["overall"]["auc"]["mean"] > 0.5
    assert popular["overall"]["users"] == 200
    ranks = np.load(tmp_path / "run" / "test_ranks.npz")["backbone"]
    assert ranks.max() <= 21
    # Ties apart, GAUC is the mean rank.
    assert own["backbone"]["overall"]["gauc"]["mean"] == pytest.approx(
        1 - (ranks - 1).mean() / 20, abs=1e-3
    )


def test_stop_on_a_stratum_keeps_its_best_epoch(config: RunConfig, tmp_path: Path) -> None:
    for s, name in enumerate(("tail", "head")):
        run = tmp_path / name
        metrics = train(replace(config, stop_on=name, heads=False, epochs=6, lr=0.02), run)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        scores = [
            line["valid"]["strata"][s]["ndcg@10"] for line in lines if line["event"] == "epoch"
        ]
        assert scores[metrics["stages"]["backbone"]["best_epoch"] - 1] == max(scores)
    with pytest.raises(ConfigError, match="--stop-on: expected overall or one of tail, head"):
        train(replace(config, stop_on="middle"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_ranks_among_negatives_are_those_of_the_same_frozen_items(
    quick: RunConfig, tmp_path: Path
) -> None:
    """Two runs of different seeds are ranked against the same items: popularity ranks agree."""
    config = replace(quick, loss="bpr", eval_negatives=15, eval_dist="popularity", heads=False)
    first = train(config, tmp_path / "a")
    second = train(replace(config, seed=5), tmp_path / "b")
    assert first["baselines"] == second["baselines"]
    assert first["test"] != second["test"]
    store, split = prepare(config.data), Split.leave_one_out()
    drawn = Negatives(15, per="user", dist="popularity").frozen(store, split)
    from pinet_fast.data import Strata

    strata = Strata.by_activeness(store, split=split, edges=config.strata)
    for block in evaluation_batches(
        store, split=split, strata=strata, max_len=5, batch_size=64, negatives=drawn
    ):
        assert block.negatives is not None
        assert not (block.negatives == block.targets[:, None]).any()


def test_head_and_tail_items_share_the_targets(quick: RunConfig, tmp_path: Path) -> None:
    metrics = train(quick, tmp_path / "run")
    items = metrics["items"]
    assert sum(items["backbone"][part]["users"] for part in ("tail", "head")) == 200
    ranks = np.load(tmp_path / "run" / "test_ranks.npz")
    is_head = ranks["target_events"] > items["head_above"]
    expected = np.where(ranks["heads"][is_head] <= 10, 1.0, 0.0).mean()
    assert items["heads"]["head"]["hr@10"]["mean"] == pytest.approx(expected)
