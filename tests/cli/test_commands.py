"""The command line as users meet it: outputs, one-line errors, exit codes, Ctrl-C, resume."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinet_fast.cli.main import main
from pinet_fast.data import simulate_log

if TYPE_CHECKING:
    from pathlib import Path

QUICK = [
    "--epochs", "2", "--head-epochs", "1", "--batch-size", "64", "--max-len", "10", "--dim", "8",
]  # fmt: skip


def run(*arguments: object) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    code = stop.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    return simulate_log(folder / "log.parquet", users=200, items=100, seed=1)


def test_train_and_compare(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint, own = tmp_path / "joint", tmp_path / "own"
    assert run("train", "--data", log, "--rule", "joint", "--out", joint, *QUICK) == 0
    shown = capsys.readouterr()
    assert re.search(r"overall .* 200 ", shown.out)
    assert "SIMULATED" in shown.out
    assert f"report: {joint / 'report.html'}" in shown.out
    assert "backbone epoch 2: loss" in shown.err
    assert json.loads((joint / "config.json").read_text())["heads"] is False
    assert run("train", "--data", log, "--rule", "agreement", "--out", own, *QUICK, "--quiet") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads((own / "config.json").read_text())["heads"] is True
    assert run("compare", joint, own, "--csv", tmp_path / "c.csv") == 0
    shown = capsys.readouterr()
    for word in ("overall", "tail", "head", "joint", "own"):
        assert word in shown.out
    assert (tmp_path / "c.csv").stat().st_size > 0
    assert run("compare", joint, own, "--json") == 0
    assert json.loads(capsys.readouterr().out)


def test_train_with_a_mix_and_negatives(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["--loss", "bce", "--negatives", 3, "--negatives-per", "user", "--negatives-dist",
               "popularity", "--negatives-alpha", 0.75, "--negatives-exclude", "window",
               "--mix", "tail=0.4,head=0.6", "--max-events", 200, "--weights", "none"]  # fmt: skip
    assert run("train", "--data", log, "--out", out, *QUICK, *options, "--quiet") == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["mix"], config["max_events"], config["weights"]) == (
        "tail=0.4,head=0.6", 200, "none",
    )  # fmt: skip
    assert (config["negatives"], config["negatives_per"]) == (3, "user")
    assert run("train", "--out", out, "--resume", "--mix", "uniform") == 2
    assert "a resumed run keeps its options" in capsys.readouterr().err
    assert run("train", "--data", log, "--out", tmp_path / "no", "--mix", "0.5,0.6") == 2
    shown = capsys.readouterr().err
    assert "sum 1" in shown
    assert not (tmp_path / "no").exists()


def test_json_is_all_there_is_on_stdout(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("train", "--data", log, "--out", out, *QUICK, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "metrics.json").read_text())


def test_ids_may_be_strings(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table(log)
    for column in ("user", "item"):
        words = pa.array([f"{column}-{value}" for value in table[column].to_pylist()])
        table = table.set_column(table.schema.get_field_index(column), column, words)
    path, out = tmp_path / "words.parquet", tmp_path / "run"
    pq.write_table(table, path)
    assert run("train", "--data", path, "--rule", "joint", "--out", out, *QUICK, "--quiet") == 0
    assert run("compare", out, out) == 0
    capsys.readouterr()
    with np.load(out / "test_ranks.npz", allow_pickle=False) as ranks:
        assert set(ranks["users"].tolist()) <= set(table["user"].to_pylist())


def bad_logs(folder: Path) -> dict[str, Path]:
    """Write one log for each way of being wrong."""
    users, items = [1, 1, 1, 2, 2, 2], [1, 2, 3, 1, 2, 3]
    tables = {
        "wrong columns": pa.table({"uid": users, "item": items}),
        "nulls": pa.table({"user": [1, None, 1, 2, 2, 2], "item": items}),
        "ids for none": pa.table({"user": users, "item": [1, -1, 3, 1, 2, 3]}),
        "truth as ids": pa.table({"user": users, "item": [True, False] * 3}),
        "empty": pa.table({"user": pa.array([], pa.int64()), "item": pa.array([], pa.int64())}),
        "one event each": pa.table({"user": [1, 2, 3], "item": [1, 2, 3]}),
        "duplicate columns": pa.Table.from_arrays(
            [pa.array(users), pa.array(items), pa.array(items)], ["user", "item", "item"]
        ),
        "good": pa.table({"user": users, "item": items}),
    }
    paths = {}
    for name, content in tables.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.parquet"
        pq.write_table(content, paths[name])
    whole = paths["good"].read_bytes()
    paths["truncated"] = folder / "truncated.parquet"
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    paths["missing"] = folder / "missing.parquet"
    return paths


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("missing", "missing.parquet"),
        ("wrong columns", "--user-col"),
        ("nulls", "null"),
        ("ids for none", "ids other than -1"),
        ("truth as ids", "integer or string"),
        ("empty", "empty|no rows|0 rows"),
        ("one event each", "two training events|2 training events"),
        ("duplicate columns", "item"),
        ("truncated", "truncated.parquet"),
    ],
)
def test_bad_logs(
    name: str, match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PINET_FAST_CACHE", str(tmp_path / "cache"))
    logs = tmp_path / "logs"
    logs.mkdir()
    path = bad_logs(logs)[name]
    before = sorted(p.name for p in logs.iterdir())
    assert run("train", "--data", path, "--out", tmp_path / "runs" / "new") == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(match, lines[0])
    assert "Traceback" not in shown.err
    assert not (tmp_path / "runs").exists()
    assert sorted(p.name for p in logs.iterdir()) == before
    if name != "one event each":  # that log is a good one, only no good for training
        assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--modle", "sasrec"], "--modle"),
        (["--model", "bert"], "--model: expected one of sasrec"),
        (["--strata", "100000"], "stratum"),
        (["--strata", "tail"], "head:0.2"),
        (["--epochs", "many"], "--epochs"),
        (["--rule", "median"], "--rule: expected one of"),
    ],
)
def test_bad_options(
    arguments: list[str], match: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--data", log, "--out", tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert match in error
    assert list(tmp_path.iterdir()) == []


def test_missing_options_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, match in (
        (["train", "--data", "x.csv"], "--out"),
        (["train", "--out", tmp_path / "r"], "--data"),
        (["trian"], "train"),
        (["compare", tmp_path], "two run folders"),
        (["compare", tmp_path, tmp_path / "none"], str(tmp_path)),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert match in error
        assert "\n" not in error


def test_unwritable_run_folder(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert run("train", "--data", log, "--out", blocker / "run") == 2
    assert "choose a folder in which you may write" in capsys.readouterr().err


def test_ctrl_c_and_resume(log: Path, tmp_path: Path) -> None:
    """In a process of its own, as a person does it."""
    out = tmp_path / "run"
    options = [*QUICK, "--epochs", "150", "--patience", "0", "--log-every", "1"]
    command = [sys.executable, "-m", "pinet_fast.cli.main", "train", "--data", log, "--out", out]
    process = subprocess.Popen(
        [str(part) for part in [*command, *options]], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    message = err.splitlines()[-1]
    assert message.startswith("interrupted: stopped after step")
    assert f"--out {out} --resume" in message
    assert not (out / "metrics.json").exists()
    assert run("train", "--out", out, "--resume", "--quiet") == 0
    assert (out / "metrics.json").exists()
    assert (out / "report.html").exists()


def test_resume_refuses_other_options(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("train", "--data", log, "--out", out, *QUICK, "--no-heads", "--quiet") == 0
    assert run("train", "--out", out, "--resume", "--lr", "0.5") == 2
    assert "a resumed run keeps its options" in capsys.readouterr().err
    # Told the same again, a finished run evaluates again and changes nothing.
    before = json.loads((out / "metrics.json").read_text())["test"]
    assert run("train", "--out", out, "--resume", "--no-heads", "--quiet") == 0
    assert json.loads((out / "metrics.json").read_text())["test"] == before


def test_demo_labels_simulated_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pinet_fast.cli.demo as module

    monkeypatch.setattr(
        module, "simulate_log", lambda path, seed: simulate_log(path, users=200, items=100)
    )
    assert run("demo", "--out", tmp_path / "demo", "--epochs", "1") == 0
    shown = capsys.readouterr()
    assert "SIMULATED" in shown.err
    assert "SIMULATED" in shown.out
    for folder in ("joint", "agreement-heads"):
        assert (tmp_path / "demo" / folder / "report.html").exists()
        assert "SIMULATED" in (tmp_path / "demo" / folder / "report.html").read_text()
    assert run("demo", "--out", tmp_path / "demo") == 2
    assert "holds joint already" in capsys.readouterr().err
    assert run("demo", "--rule", "joint") == 2


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    import pinet_fast

    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == pinet_fast.__version__
    for arguments in (["--help"], ["train", "--help"], ["compare", "--help"], ["demo", "--help"]):
        assert run(*arguments) == 0
        assert "Usage" in capsys.readouterr().out
