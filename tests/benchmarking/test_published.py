"""The list of training runs, the commands made of it, and the kept summaries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.harness.run_tables import clicks, compared, published, summaries
from benchmarks.published import repeats
from benchmarks.published.__main__ import SUMMARIES, Run, chosen, listed, main
from pinet_fast.cli.run_options import resolved
from pinet_fast.data import simulate_log
from pinet_fast.report import RunSummary
from pinet_fast.report.results_table import results_rows


def test_every_listed_run_is_a_valid_configuration() -> None:
    runs = listed()
    assert len({(run.name, run.seed) for run in runs}) == len(runs)
    for run in runs:
        config = resolved(run.options | {"seed": run.seed}, None, None)
        assert config.seed == run.seed


def test_names_choose_runs() -> None:
    runs = [Run(name, 0, {}) for name in ("a", "a-wide", "b-1", "b-2")]
    assert [run.name for run in chosen(runs, [])] == ["a", "a-wide", "b-1", "b-2"]
    assert [run.name for run in chosen(runs, ["a"])] == ["a"]
    assert [run.name for run in chosen(runs, ["a-", "b"])] == ["a-wide", "b-1", "b-2"]
    assert chosen(runs, ["c"]) == []


def test_commands_start_and_resume(tmp_path: Path) -> None:
    options = {"data": "log.parquet", "loss": "ce", "heads": True, "attributes": "items.parquet"}
    run = Run("a", 3, options)
    assert run.command(Path("logs"), tmp_path, 2) == [
        "pinet-fast", "train", "--out", str(tmp_path / "a" / "seed-3"),
        "--data", "logs/log.parquet", "--set", "loss=ce", "--set", "heads=true",
        "--set", "attributes=logs/items.parquet", "--set", "seed=3", "--set", "threads=2",
    ]  # fmt: skip
    (tmp_path / "a" / "seed-3").mkdir(parents=True)
    (tmp_path / "a" / "seed-3" / "checkpoint.pt").touch()
    assert run.command(Path("logs"), tmp_path, 2)[-1] == "--resume"


def test_a_run_trains_once_and_leaves_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    simulate_log(tmp_path / "log.parquet", users=60, items=100)
    runs = tmp_path / "runs.toml"
    runs.write_text(
        '[small]\ndata = "log.parquet"\nseeds = [0]\nrule = "joint"\n'
        "epochs = 1\ndim = 8\nmax_len = 9\n"
    )
    monkeypatch.setattr("benchmarks.published.__main__.RUNS", runs)
    monkeypatch.setenv("PINET_FAST_CACHE", str(tmp_path / "cache"))
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    where += ["--summaries", str(tmp_path / "kept"), "--threads", "1"]
    assert main(where) == 0
    assert "small seed 0" in capfd.readouterr().out
    kept = tmp_path / "kept" / "small" / "seed-0.json"
    summary = RunSummary.load(kept)
    assert summary.name == "small/seed-0"
    assert str(tmp_path) not in kept.read_text()
    kept.unlink()
    assert main(where) == 0  # finished: nothing trains, the summary comes back
    assert "small seed 0" not in capfd.readouterr().out
    assert kept.exists()
    with pytest.raises(SystemExit):
        main([*where, "nothing"])
    assert "no run is called nothing" in capfd.readouterr().err


def test_a_run_that_fails_is_told_by_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs.toml"
    runs.write_text('[small]\ndata = "missing.parquet"\nseeds = [0]\n')
    monkeypatch.setattr("benchmarks.published.__main__.RUNS", runs)
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1


def test_kept_summaries_are_of_listed_runs() -> None:
    known = {(run.name, run.seed): run for run in listed()}
    files = sorted(SUMMARIES.glob("*/*.json"))
    assert files
    for file in files:
        summary = RunSummary.load(file)
        run = known[file.parent.name, int(file.stem.removeprefix("seed-"))]
        own = {key: summary.config[key] for key in run.options}
        assert own == run.options, f"{file}: trained with other options than runs.toml has"
        assert "/" not in summary.config["data"]
    assert results_rows([RunSummary.load(file) for file in files])


def test_tables_of_the_kept_runs(tmp_path: Path) -> None:
    kept = summaries()
    assert kept
    text = published()
    for name, runs in kept.items():
        if not name.startswith(("compare-", "din")):
            mean = sum(r.test["backbone"].overall.metrics["ndcg@10"].mean or 0 for r in runs)
            assert f"| `{name}` |" in text
            assert f"{mean / len(runs):.4f}" in text
    assert published(tmp_path) == clicks(tmp_path) == compared(tmp_path) == ""


def test_targets_that_a_user_had_before_count_as_misses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PINET_FAST_CACHE", str(tmp_path / "cache"))
    log, run = tmp_path / "log.parquet", tmp_path / "run"
    users = np.repeat([7, 8, 9], 4)
    items = [1, 2, 3, 1, 1, 2, 3, 4, 4, 4, 2, 4]  # of 7 and 9 the last comes back
    pq.write_table(pa.table({"user": users, "item": items}), log)
    run.mkdir()
    (run / "config.json").write_text('{"order": "rows"}')
    np.savez(run / "test_ranks.npz", users=[9, 8, 7], backbone=[1, 1, 30])
    assert repeats.main([str(run), "--data", str(log)]) == 0
    shown = capsys.readouterr().out
    assert "66.7% of 3 users" in shown
    assert "as they are: NDCG@10 0.6667, HR@10 0.6667" in shown
    assert "as misses: NDCG@10 0.3333, HR@10 0.3333" in shown
