"""Runs: reproducible, resumable to the bit, honest about what they leave."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.runs import StopAt, assert_same_run, log_of, weights_of

from pinet_fast.data import Split, Strata, evaluation_batches, prepare, simulate_log
from pinet_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    StrataError,
    TrainingInterrupted,
)
from pinet_fast.training import RunConfig, train
from pinet_fast.training.evaluate import target_ranks
from pinet_fast.training.metrics import summarise
from pinet_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path


def test_two_runs_with_one_seed_are_bit_identical(config: RunConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "a")
    train(config, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    train(replace(config, seed=1), tmp_path / "c")
    assert not torch.equal(
        weights_of(tmp_path / "a")["backbone.items.weight"],
        weights_of(tmp_path / "c")["backbone.items.weight"],
    )


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("step", [1, 4, 6, 12, 15, 20], ids=lambda s: f"step{s}")
def test_resume_is_bit_identical_to_an_unbroken_run(
    config: RunConfig, tmp_path: Path, loss: str, step: int
) -> None:
    """Epochs have 4 steps: inside and at the end of an epoch, of stage 1, and of stage 2."""
    config = replace(config, loss=loss)
    train(config, tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(TrainingInterrupted, match="--resume"):
        train(config, broken, observer=StopAt(step))
    assert not (broken / "metrics.json").exists()
    train(None, broken, resume=True)
    assert_same_run(tmp_path / "whole", broken)


def test_what_a_run_leaves(config: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "nested" / "run"
    metrics = train(config, run)
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint.pt", "config.json", "log.jsonl", "metrics.csv", "metrics.json",
        "test_ranks.npz",
    ]  # fmt: skip
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert RunConfig.load(run / "config.json") == config
    assert metrics["data"]["simulated"] is True
    assert metrics["final"] == "heads"
    assert [s["name"] for s in metrics["strata"]] == ["tail", "head"]
    assert sum(s["users"] for s in metrics["strata"]) == 200
    ranks = np.load(run / "test_ranks.npz")
    for stage in ("backbone", "heads"):
        assert metrics["test"][stage]["overall"] == summarise(ranks[stage])
        for s, group in enumerate(metrics["test"][stage]["strata"]):
            assert group == summarise(ranks[stage][ranks["strata"] == s])
    assert any("items.weight: embedding" in line for line in metrics["coverage"])
    assert all("proven at step" in line for line in metrics["coverage"])
    steps = [line for line in log_of(run) if line["event"] == "step"]
    assert [line["step"] for line in steps if line["stage"] == "backbone"] == list(range(1, 13))
    assert steps[0]["cosines"] is not None
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    assert header == "part,stage,group,users,metric,mean,low,high"
    assert len(rows) == 2 * 2 * 3 * 9  # parts, stages, groups, metrics


def test_heads_never_lower_the_validation_of_a_stratum(config: RunConfig, tmp_path: Path) -> None:
    """Untrained heads take part in the choice, so a stratum keeps at least its backbone's score."""
    valid = train(config, tmp_path / "run")["valid"]
    for plain, headed in zip(valid["backbone"]["strata"], valid["heads"]["strata"], strict=True):
        assert headed["ndcg@10"]["mean"] >= plain["ndcg@10"]["mean"]


def test_the_best_epoch_is_the_one_reported(config: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    metrics = train(replace(config, heads=False, epochs=6, lr=0.02), run)
    scores = [
        line["valid"]["overall"]["ndcg@10"] for line in log_of(run) if line["event"] == "epoch"
    ]
    best = metrics["stages"]["backbone"]["best_epoch"]
    assert scores[best - 1] == max(scores)
    assert metrics["valid"]["backbone"]["overall"]["ndcg@10"]["mean"] == pytest.approx(max(scores))


def test_patience_ends_a_stage(config: RunConfig, tmp_path: Path) -> None:
    stuck = replace(config, heads=False, lr=1e-12, epochs=30, patience=2)
    metrics = train(stuck, tmp_path / "run")
    assert metrics["stages"]["backbone"]["epochs"] < 30


@pytest.mark.parametrize("rule", ["joint", "backdoor", "agreement"])
def test_training_learns(small_log: Path, tmp_path: Path, rule: str) -> None:
    """On a log with structure every rule beats the popularity of items clearly."""
    log = simulate_log(tmp_path / "log.parquet", users=600, items=150, seed=0)
    config = RunConfig(
        data=str(log), rule=rule, heads=False, epochs=12, batch_size=32, max_len=20, dim=32,
        dropout=0.2, lr=5e-3, threads=2,
    )  # fmt: skip
    got = train(config, tmp_path / "run")["test"]["backbone"]["overall"]["ndcg@10"]["mean"]
    store = prepare(log)
    split = Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")
    counts = torch.bincount(torch.from_numpy(store.items.copy()).long(), minlength=151).float()
    ranks = [
        target_ranks(
            counts.expand(len(b.targets), -1).clone(), b.targets, b.history, b.history_offsets
        )
        for b in evaluation_batches(
            store, split=split, strata=strata, part="test", max_len=20, batch_size=100
        )
    ]
    popularity = summarise(torch.cat(ranks).numpy())["ndcg@10"]["mean"]  # type: ignore[index]
    assert popularity is not None
    assert got > 1.5 * popularity


class TestBadInput:
    """Nothing half-written is left behind."""

    def test_bad_log_leaves_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"missing\.parquet"):
            train(RunConfig(data=str(tmp_path / "missing.parquet")), tmp_path / "new" / "run")
        assert list(tmp_path.iterdir()) == []

    def test_empty_stratum(self, config: RunConfig, tmp_path: Path) -> None:
        with pytest.raises(StrataError):
            train(replace(config, strata="100000"), tmp_path / "run")
        assert list(tmp_path.iterdir()) == []

    def test_unwritable_folder(self, config: RunConfig, tmp_path: Path) -> None:
        blocker = tmp_path / "file"
        blocker.write_text("x")
        with pytest.raises(ConfigError, match="cannot write there"):
            train(config, blocker / "run")
        assert blocker.read_text() == "x"

    def test_foreign_or_finished_folder_is_left_alone(
        self, config: RunConfig, tmp_path: Path
    ) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match="not empty"):
            train(config, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
        train(replace(config, epochs=1, heads=False), tmp_path / "run")
        with pytest.raises(ConfigError, match="holds a run already"):
            train(config, tmp_path / "run")

    def test_folder_of_a_run_in_progress(self, config: RunConfig, tmp_path: Path) -> None:
        run, second = tmp_path / "run", []

        class Intruder(StopAt):
            def step_done(self, loss: float) -> None:
                if not second:
                    for resume in (True, False):
                        with pytest.raises(ConfigError) as caught:
                            train(None if resume else config, run, resume=resume)
                        second.append(str(caught.value))
                super().step_done(loss)

        with pytest.raises(TrainingInterrupted):
            train(config, run, observer=Intruder(2))
        assert second[0] == (
            f"--out {run}: another run is training into this folder; wait until it has ended, stop "
            "it, or choose another folder"
        )
        assert "holds a run already" in second[1]
        train(config, tmp_path / "alone")
        train(None, run, resume=True)  # the claim ended with the run
        assert_same_run(tmp_path / "alone", run)

    def test_folder_claimed_before_it_holds_anything(
        self, config: RunConfig, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        with RunFolder(run) as other, other.creating():
            with pytest.raises(ConfigError, match="another run is training"):
                train(config, run)
            assert run.is_dir()  # it is the other's

    def test_resume_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no run folder"):
            train(None, tmp_path, resume=True)

    def test_resume_of_a_damaged_checkpoint(self, config: RunConfig, tmp_path: Path) -> None:
        run = tmp_path / "run"
        train(replace(config, epochs=1, heads=False), run)
        whole = (run / "checkpoint.pt").read_bytes()
        (run / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="damaged or foreign"):
            train(None, run, resume=True)
        (run / "checkpoint.pt").unlink()
        with pytest.raises(CheckpointError, match="nothing to resume"):
            train(None, run, resume=True)

    def test_resume_on_a_changed_log(self, config: RunConfig, tmp_path: Path) -> None:
        log = simulate_log(tmp_path / "log.parquet", users=100, items=100, seed=0)
        run = tmp_path / "run"
        with pytest.raises(TrainingInterrupted):
            train(replace(config, data=str(log)), run, observer=StopAt(2))
        simulate_log(log, users=100, items=100, seed=5)
        with pytest.raises(CheckpointError, match="another content"):
            train(None, run, resume=True)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"rule": "agrement"}, "did you mean 'agreement'"),
            ({"model": "bert"}, "--model: expected one of sasrec"),
            ({"loss": "mse"}, "--loss"),
            ({"epochs": 0}, "--epochs: expected a number >= 1"),
            ({"lr": float("nan")}, "--lr"),
            ({"model": "din"}, "--loss ce: --model din is trained with bce only"),
            ({"model": "din", "loss": "bce"}, "--eval-negatives 0: --model din scores candidates"),
            ({"attributes": "x.csv"}, "only --model din or din-mean has that option"),
            ({"targets": "last"}, "only --model din or din-mean"),
            ({"model": "gru4rec", "norm": "post"}, "only --model sasrec"),
            ({"gbce_t": 0.5}, "only --loss gbce has it"),
            ({"loss": "gbce", "gbce_t": 2.0}, "expected 0 <= t <= 1"),
            ({"head": "plug"}, "--head: expected one of gate, plugin, prediction; got 'plug'; did"),
            ({"eval_dist": "popularity"}, "the whole catalogue is ranked"),
            ({"dropout": 1.0}, "--dropout"),
            ({"dim": 9, "attention_heads": 2}, "does not divide"),
            ({"prior": "users"}, "only --rule backdoor has a prior"),
            ({"seed": -1}, "--seed"),
            ({"max_events": -1}, "--max-events: expected a number >= 0"),
            ({"mix": "uniformly"}, "--mix: expected proportional, uniform, sqrt"),
            ({"mix": "tail=0.5,0.5"}, "--mix: expected"),
            ({"mix": "tail=0.5,tail=0.5"}, "given twice"),
            ({"weights": "users"}, "--weights: expected one of population, none"),
            ({"negatives": 3}, "--loss ce draws no negatives; take bce, ss, bpr, gbce"),
            ({"negatives_exclude": "none"}, "--loss ce draws no negatives"),
            ({"loss": "bce", "negatives": 0}, "--negatives: expected a number >= 1"),
            ({"loss": "bce", "negatives_per": "row"}, "--negatives-per: expected one of event"),
            ({"loss": "bce", "negatives_alpha": 0.5}, "--negatives-dist popularity"),
            (
                {"loss": "bce", "negatives_dist": "popularity", "negatives_alpha": float("inf")},
                "--negatives-alpha: expected a finite",
            ),
        ],
    )
    def test_bad_options(self, config: RunConfig, change: dict[str, Any], match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            replace(config, **change)

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("{", "cannot be read as JSON"),
            ("[]", "expected a JSON object"),
            ('{"data": "x", "epoch": 3}', "unknown key 'epoch'; did you mean 'epochs'"),
            ('{"data": "x", "epochs": "3"}', "must be of type int"),
            ('{"data": "x", "epochs": true}', "must be of type int"),
            ("{}", "'data' is missing"),
        ],
    )
    def test_bad_config_files(self, tmp_path: Path, content: str, match: str) -> None:
        path = tmp_path / "config.json"
        path.write_text(content)
        with pytest.raises(ConfigError, match=match):
            RunConfig.load(path)
