"""evaluate, table, the plot of compare, and completion, as users meet them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pinet_fast.cli.main import main
from pinet_fast.data import simulate_log

QUICK = ["--epochs", 2, "--head-epochs", 1, "--batch-size", 64, "--max-len", 10, "--dim", 8]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    code = stop.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a plain, a deconfounded and a DIN run."""
    folder = tmp_path_factory.mktemp("runs")
    log = simulate_log(folder / "log.parquet", users=120, items=100, seed=1)
    for name, options in {
        "joint": ["--rule", "joint"],
        "own": ["--rule", "agreement"],
        "din": ["--model", "din", "--eval-negatives", 30],
    }.items():
        assert run("train", "--data", log, "--out", folder / name, *QUICK, *options, "--quiet") == 0
    return folder


def test_evaluate_gives_what_the_run_reported(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("joint", "own", "din"):
        before = {p.name: p.read_bytes() for p in (runs / name).iterdir()}
        known = json.loads((runs / name / "metrics.json").read_text())
        for part in ("test", "valid"):
            assert run("evaluate", runs / name, "--part", part, "--json") == 0
            got = json.loads(capsys.readouterr().out)
            assert got[part] == known[part]
            assert got["clicks"][part] == known["clicks"][part]
            assert got["baselines"] == known["baselines"]
        assert {p.name: p.read_bytes() for p in (runs / name).iterdir()} == before


def test_evaluate_by_another_protocol(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", runs / "own", "--eval-negatives", 10, "--eval-dist", "popularity") == 0
    shown = capsys.readouterr().out
    assert "10 negatives ranking" in shown
    assert "popularity AUC" in shown
    assert run("evaluate", runs / "din", "--eval-negatives", 0) == 2
    assert "--model din scores candidates" in capsys.readouterr().err
    assert run("evaluate", runs / "own", "--part", "train") == 2
    assert "expected test or valid" in capsys.readouterr().err
    assert run("evaluate", runs) == 2
    assert "no run folder" in capsys.readouterr().err


def test_compare_draws_and_refuses_other_protocols(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".svg", ".png"):
        path = tmp_path / f"plot{suffix}"
        assert run("compare", runs / "joint", runs / "own", runs / "joint", "--plot", path) == 0
        assert path.stat().st_size > 5000
    assert "joint" in (tmp_path / "plot.svg").read_text()
    capsys.readouterr()
    assert run("compare", runs / "joint", runs / "own", "--plot", tmp_path / "plot.pdf") == 2
    assert "ending in .png or .svg" in capsys.readouterr().err
    assert run("compare", runs / "joint", runs / "din") == 2
    assert "ranked against 30 uniform negatives" in capsys.readouterr().err


def test_reports_against_a_baseline(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joint, log = runs / "joint", runs / "log.parquet"
    folders = [shutil.copytree(runs / name, tmp_path / name) for name in ("joint", "own")]
    before = [(folder / "report.html").read_text() for folder in folders]
    assert run("compare", *folders, folders[0], "--reports") == 0
    after = [(folder / "report.html").read_text() for folder in folders]
    assert after[0] == before[0]
    assert "Against joint training" not in before[1]
    assert "Against joint training" in after[1]

    options = ["--data", log, *QUICK, "--no-heads", "--quiet"]
    own, others = tmp_path / "with", tmp_path / "others"
    assert run("train", *options, "--out", own, "--baseline", joint) == 0
    assert "Against joint training" in (own / "report.html").read_text()

    assert run("train", *options, "--out", others, "--seeds", "3,4", "--baseline", own) == 0
    assert "Against with" in (others / "seed-4" / "report.html").read_text()
    seeds = tmp_path / "seeds"
    assert run("train", *options, "--out", seeds, "--seeds", "3", "--baseline", others) == 0
    assert "Against others/seed-3" in (seeds / "seed-3" / "report.html").read_text()

    capsys.readouterr()
    assert run("train", *options, "--out", tmp_path / "none", "--baseline", tmp_path) == 2
    assert "expected a run folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_baseline_that_does_not_fit_costs_its_section_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["--data", runs / "log.parquet", *QUICK, "--no-heads", "--strata", "quantile:3"]
    assert run("train", *options, "--out", out, "--baseline", runs / "joint") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "--baseline: compare:" in told
    assert "the report was written without it" in told
    assert "Against" not in (out / "report.html").read_text()


def test_table(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("table", *(runs / n for n in ("joint", "own", "din")), "--csv", tmp_path / "t") == 0
    shown = capsys.readouterr().out
    assert "SIMULATED" in shown
    assert "AUC and GAUC" in shown  # of the run that scores candidates
    rows = list(csv.DictReader((tmp_path / "t").read_text().splitlines()))
    # A row a stage: the joint run has no heads, the others have.
    assert [(r["model"], r["rule"]) for r in rows] == [
        ("sasrec", "joint"), ("sasrec", "agreement"), ("sasrec", "agreement + plugin heads"),
        ("din", "backdoor (uniform prior)"), ("din", "backdoor (uniform prior) + plugin heads"),
    ]  # fmt: skip
    assert {(r["runs"], r["simulated"]) for r in rows} == {("1", "True")}
    assert [bool(r["gauc"]) for r in rows] == [False] * 3 + [True] * 2
    assert run("table", runs / "din" / "metrics.json") == 0
    capsys.readouterr()
    assert run("table", runs / "joint", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["published"] is None
    assert run("table", runs / "nothing") == 2
    assert "not found" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "table"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert f"pinet-fast {command}" in shown.split("Example", 1)[1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pinet-fast eva", {"evaluate"}),
        ("pinet-fast train --mod", {"--model"}),
        ("pinet-fast train --model din", {"din", "din-mean"}),
        ("pinet-fast train --loss ", {"ce", "bce", "ss", "bpr", "gbce"}),
        ("pinet-fast train --rule b", {"backdoor", "balanced"}),
        ("pinet-fast train --head g", {"gate"}),
    ],
)
def test_shells_complete(line: str, expected: set[str]) -> None:
    words = line.split(" ")
    environment = {
        **os.environ,
        "_PINET_FAST_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    script = Path(sys.executable).parent / "pinet-fast"
    done = subprocess.run(
        [script], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert set(done.stdout.split()) == expected
