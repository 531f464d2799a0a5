"""Options of a run from a file, the command line and --set: who wins, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pinet_fast.cli.main import main
from pinet_fast.cli.run_options import read_setting, resolved, seed_runs
from pinet_fast.data import simulate_log
from pinet_fast.errors import ConfigError
from pinet_fast.training import RunConfig
from pinet_fast.training.tensorboard import scalars_of


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    code = stop.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    return simulate_log(folder / "log.parquet", users=120, items=100, seed=1)


def test_set_goes_before_the_command_line_and_that_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "base.toml"
    path.write_text('data = "a.parquet"\nlr = 0.1\nepochs = 3\ndim = 8\nheads = false\n')
    got = resolved({"epochs": 4, "dim": 16}, path, ["dim=32", "tied=false"])
    assert (got.data, got.lr, got.epochs, got.dim, got.tied) == ("a.parquet", 0.1, 4, 32, False)
    assert got.heads is False
    as_json = tmp_path / "config.json"
    as_json.write_text(json.dumps(got.to_dict()))
    assert resolved({}, as_json, None) == got


def test_what_nobody_names_follows_from_the_rest() -> None:
    joint = resolved({"data": "x", "rule": "joint"}, None, None)
    assert (joint.heads, joint.loss, joint.eval_negatives) == (False, "ce", 0)
    din = resolved({"data": "x"}, None, ["model=din"])
    assert (din.heads, din.loss, din.eval_negatives) == (True, "bce", 100)
    own = resolved({"data": "x", "model": "din", "eval_negatives": 7, "heads": False}, None, None)
    assert (own.heads, own.eval_negatives) == (False, 7)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["lrr=0.1"], "unknown key 'lrr'; did you mean 'lr'"),
        (["lr"], "expected KEY=VALUE"),
        (["=3"], "expected KEY=VALUE"),
        (["epochs=many"], "expected a value of type int for epochs"),
        (["heads=maybe"], "expected true or false for heads"),
        (["epochs=0"], "--epochs: expected a number >= 1"),
    ],
)
def test_bad_settings(settings: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        resolved({"data": "x"}, None, settings)


def test_settings_have_the_type_of_their_key() -> None:
    assert read_setting("batch-size=64") == ("batch_size", 64)
    assert read_setting("lr=1") == ("lr", 1.0)
    assert read_setting("heads=TRUE") == ("heads", True)
    assert read_setting("mix=tail=0.5,head=0.5") == ("mix", "tail=0.5,head=0.5")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("x.toml", "lr = ", "cannot be read as TOML or JSON"),
        ("x.json", "{", "cannot be read as TOML or JSON"),
        ("x.json", "[1]", "expected keys and values, got list"),
        ("x.toml", "eval_evry = 2", "did you mean 'eval_every'"),
        ("x.toml", 'lr = "fast"', "lr must be of type float"),
        ("x.toml", "", "--data: missing"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, match: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    data = {} if "missing" in match else {"data": "x"}
    with pytest.raises(ConfigError, match=match):
        resolved(data, path, None)
    with pytest.raises(ConfigError, match="not found"):
        resolved(data, tmp_path / "none.toml", None)


def test_seeds() -> None:
    config = RunConfig(data="x")
    runs = seed_runs(config, Path("out"), "3,5")
    assert [(str(folder), c.seed if c else None) for c, folder in runs] == [
        ("out/seed-3", 3), ("out/seed-5", 5),
    ]  # fmt: skip
    for bad in ("", "a", "1,1", "1;2"):
        with pytest.raises(ConfigError, match="different whole numbers"):
            seed_runs(config, Path("out"), bad)


def test_a_file_and_seeds_through_the_command(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "base.toml"
    path.write_text(f'data = "{log}"\nrule = "joint"\ndim = 8\nmax_len = 10\nepochs = 5\n')
    out = tmp_path / "runs"
    options = ["--config", path, "--set", "epochs=1", "--batch-size", 64, "--out", out]
    assert run("train", *options, "--seeds", "0,1", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert [m["config"]["seed"] for m in metrics] == [0, 1]
    assert metrics[0]["config"]["epochs"] == 1
    assert metrics[0]["config"]["heads"] is False
    assert metrics[0]["test"] != metrics[1]["test"]
    assert sorted(p.name for p in out.iterdir()) == ["seed-0", "seed-1"]
    assert run("train", "--out", out / "seed-0", "--resume", "--seeds", "0") == 2
    assert "resume that one" in capsys.readouterr().err
    assert run("train", *options, "--set", "batchsize=3") == 2
    assert "did you mean 'batch_size'" in capsys.readouterr().err


def test_tensorboard_is_optional(
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--data", log, "--rule", "joint", "--epochs", 1, "--dim", 8, "--max-len", 10]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "none"
    assert run("train", *options, "--out", out, "--tensorboard") == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not out.exists()

    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            self.log_dir = log_dir

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert run("train", *options, "--out", tmp_path / "run", "--tensorboard", "--quiet") == 0
    names = {name for name, _, _ in written}
    assert {"backbone/loss", "backbone/valid/ndcg@10/overall", "closed"} <= names
    assert written[-1][0] == "closed"


def test_scalars_of_a_record() -> None:
    record: dict[str, Any] = {
        "event": "step", "stage": "backbone", "step": 3, "loss": 1.5, "norms": [0.5, None],
        "weights": None, "cosines": [[1.0]], "events_per_second": float("nan"),
    }  # fmt: skip
    assert scalars_of(record) == {"loss": 1.5, "norms/0": 0.5}
    record = {"train_loss": 2.0, "valid": {"overall": {"hr@10": 0.1}, "strata": [{"hr@10": None}]}}
    assert scalars_of(record) == {"train_loss": 2.0, "valid/hr@10/overall": 0.1}
