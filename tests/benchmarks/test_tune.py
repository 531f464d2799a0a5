"""The tuner, with times of our own making and, in the interpreter, with the kernels themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
IN_THE_INTERPRETER = """
import shutil, sys
from pathlib import Path
import torch
from benchmarks import tune
from benchmarks.gpu_report.setting import Setting
setting = Setting(torch.device("cpu"), "triton", True, float("inf"))
tables = ["stratum_gram", "stratum_sums", "routed_linear"]
tune.tune(setting, tables, Path(sys.argv[1]), "a test", 1)
"""


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import tune

    return tune


@pytest.fixture
def folder(tmp_path):
    from pinet_fast.kernels import _configs

    return Path(shutil.copytree(_configs.FOLDER, tmp_path / "configs"))


def target(tune):
    from benchmarks.gpu_report.cases import Case

    return tune.Target("stratum_sums", "float32", "all", Case("stratum_sums", "x", None, (1, 1), 0))


def present():
    from pinet_fast.kernels import _configs

    return _configs.lookup("stratum_sums", torch.device("cpu"), "float32", "all")


def test_fastest_config_that_is_right_wins_and_holds_while_it_is_tried(tune):
    tried = tune.candidates("stratum_sums", present())
    assert tried[0] == present()
    assert len({json.dumps(c, sort_keys=True) for c in tried}) == len(tried) == 54

    def seconds(target):
        held = present()
        if held["TILE_ELEMENTS"] == 4096 and held["num_warps"] == 4:
            raise RuntimeError("out of shared memory")
        return 1.0 / held["TILE_ELEMENTS"] / held["num_warps"]

    config, best, before = tune.best(target(tune), tried, seconds, lambda t: True)
    assert (config["TILE_ELEMENTS"], config["num_warps"]) == (4096, 8)
    assert (best, before) == (1 / 4096 / 8, 1 / 2048 / 4)
    config, *_ = tune.best(target(tune), tried, seconds, lambda t: present()["num_warps"] == 4)
    assert (config["TILE_ELEMENTS"], config["num_warps"]) == (2048, 4)
    assert present() == tried[0]


def test_small_gains_change_nothing(tune):
    tried = tune.candidates("stratum_sums", present())
    almost = {4: 1.0, 8: 0.99}
    config, *times = tune.best(
        target(tune), tried, lambda t: almost[present()["num_warps"]], lambda t: True
    )
    assert config == tried[0]
    assert times == [1.0, 1.0]


def test_no_config_that_serves_is_an_error(tune):
    with pytest.raises(RuntimeError, match="stratum_sums float32 all: no config serves"):
        tune.best(target(tune), tune.candidates("stratum_sums", present()), None, lambda t: False)


def test_entries_replace_their_like_and_are_found(tune, folder, monkeypatch):
    from pinet_fast.kernels import _configs

    monkeypatch.setattr(_configs, "FOLDER", folder)
    monkeypatch.setattr(_configs, "arch_of", lambda device: "sm_90")
    config = {**present(), "TILES": 99}
    key = {"arch": "sm_90", "dtype": "float32", "bucket": "all"}
    before = len(json.loads((folder / "stratum_sums.json").read_text()))
    for tiles in (98, 99):
        entry = {**key, "config": {**config, "TILES": tiles}, "source": "a test"}
        tune.write(folder, "stratum_sums", entry)
    assert len(json.loads((folder / "stratum_sums.json").read_text())) == before + 1
    _configs.table.cache_clear()
    _configs.of_arch.cache_clear()
    try:
        assert present()["TILES"] == 99
        other = _configs.lookup("stratum_sums", torch.device("cpu"), "bfloat16", "all")
        assert other["TILES"] != 99
        with pytest.raises(KeyError, match="no entry for sm_90, float32, wide"):
            _configs.lookup("stratum_sums", torch.device("cpu"), "float32", "wide")
    finally:
        _configs.table.cache_clear()
        _configs.of_arch.cache_clear()


def test_grids_and_targets_name_what_the_tables_hold(tune):
    from benchmarks.gpu_report.setting import Setting
    from pinet_fast.kernels import _configs

    assert sorted(tune.GRIDS) == _configs.tables()
    setting = Setting(torch.device("cpu"), "reference", True, float("inf"))
    for found in tune.targets(setting):
        config = _configs.lookup(found.table, setting.device, found.dtype, found.bucket)
        assert set(config) & set(tune.GRIDS[found.table])


def test_nothing_is_tuned_at_run_time():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "triton.autotune" not in path.read_text(), path


@pytest.mark.interpret
@pytest.mark.slow
def test_tuner_in_the_interpreter(folder):
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER, str(folder)], cwd=ROOT, capture_output=True,
        text=True, check=False, env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    assert all(" us {" in line for line in lines)
    tuned = json.loads((folder / "stratum_gram.json").read_text())
    assert next(entry["source"] for entry in tuned) == "a test"


def test_without_a_gpu_it_says_so_in_one_line(tune, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "tune: no CUDA device\n"
    assert tune.main(["gram"]) == 2
    assert capsys.readouterr().err.startswith("tune: no table 'gram'; there are routed_linear")
