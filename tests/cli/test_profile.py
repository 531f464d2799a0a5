"""``pinet-fast profile``: the phase table, the trace, and steps marked for Nsight."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pinet_fast import profiling
from pinet_fast.cli import profile as command
from pinet_fast.cli.main import main
from pinet_fast.cli.train import train
from pinet_fast.data import simulate_log
from pinet_fast.training import RunConfig
from pinet_fast.training.step_profile import run_bracketed

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ["--batch-size", "16", "--max-len", "5", "--dim", "8", "--blocks", "1", "--steps", "2"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    code = stop.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_log(tmp_path_factory.mktemp("log") / "log.parquet", users=200, items=100)


def test_a_table_of_phases_and_the_command_for_nsight(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--steps", 20]  # small batches are built several at a time: not in every step
    assert run("profile", "--data", log, "--loss", "bce", "--warmup", 3, *QUICK, *steps) == 0
    out = capsys.readouterr().out
    for phase in ("data/plan", "data/gather", "data/negatives", "model: forward", "linear",
                  "backward", "gram", "rule", "combine", "optim", "rest"):  # fmt: skip
        assert phase in out
    assert "Nsight: nsys profile" in out
    assert not profiling.is_enabled()


def test_json_and_a_trace_that_holds_the_ranges(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    options = ["--data", log, "--warmup", 0, "--trace", trace, "--json", "--check", "always"]
    assert run("profile", *options, *QUICK) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2
    phases = {phase["name"]: phase for phase in found["phases"]}
    assert phases["forward"]["calls"] == phases["gram"]["calls"] == phases["step"]["calls"] == 1
    assert phases["leak check"]["inside"] == "backward"
    assert phases["leak check"]["ms"] < phases["backward"]["ms"]
    assert phases["linear"]["inside"] == "forward"
    assert "negatives" not in phases  # --loss ce draws none
    own = sum(phase["ms"] for phase in found["phases"] if phase["inside"] is None)
    assert own + found["rest_ms"] == pytest.approx(found["profiled_ms"], rel=1e-6)
    assert sum(p["share"] for p in found["phases"] if p["inside"] is None) <= 1
    assert found["nsys"].startswith("nsys profile")

    events = json.loads(trace.read_text())["traceEvents"]
    shown = [e for e in events if e.get("name") == "pinet_fast/model/forward"]
    assert len(shown) == 2
    assert all(e["ph"] == "X" and e["dur"] > 0 for e in shown)


def test_nothing_but_its_own_words_is_on_stderr(log: Path) -> None:
    script = "from pinet_fast.cli.main import main; main()"
    command = [sys.executable, "-c", script, "profile", "--data", str(log), "--quiet", *QUICK]
    environ = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_without_data_the_log_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "--warmup", 1, *QUICK) == 0
    assert "SIMULATED" in capsys.readouterr().err


def test_every_option_of_train_is_taken_or_left_out_by_name() -> None:
    taken = set(inspect.signature(command.profile).parameters)
    of_train = set(inspect.signature(train).parameters)
    of_runs = {f.name for f in dataclasses.fields(RunConfig)}
    assert (of_train & of_runs) - taken == command._NOT_TAKEN - taken
    assert of_runs >= command._NOT_TAKEN
    assert {"model", "loss", "strata", "batch_size", "max_len", "threads", "seed"} <= taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "3"], "--epochs"),
        (["--rule", "agreemnt"], "rule"),
        (["--steps", "0"], "--steps"),
        (["--trace", "no/such/folder/t.json"], "the folder does not exist"),
        (["--data", "no-such.parquet"], "no-such.parquet"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("profile", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_under_nsight_steps_are_marked_and_not_profiled(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    monkeypatch.setattr(torch.profiler, "profile", None)
    assert run("profile", "--data", log, "--warmup", 1, *QUICK) == 0
    assert "were marked for Nsight" in capsys.readouterr().err


def test_marked_steps_lie_between_start_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    runtime = SimpleNamespace(
        cudaProfilerStart=lambda: calls.append("start"),
        cudaProfilerStop=lambda: calls.append("stop"),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

    class Stage:
        def train_step(self, batch: Any) -> None:
            calls.append(f"step {batch}, ranges {profiling.is_enabled()}")

    run_bracketed(Stage(), iter([1, 2, 3]), 2)  # type: ignore[arg-type]
    assert calls == [
        "wait", "start", "step 1, ranges True", "step 2, ranges True", "wait", "stop",
    ]  # fmt: skip
    assert not profiling.is_enabled()


def test_the_command_for_nsight_keeps_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = command.nsys_command(["profile", "--data", "my log.parquet"])
    assert shlex.split(shown)[-4:] == ["pinet-fast", "profile", "--data", "my log.parquet"]
    assert "--capture-range" not in shown
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--capture-range cudaProfilerApi" in command.nsys_command(["profile"])
