"""README's performance tables are what ``make tables`` makes of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.markdown import inverse, span
from benchmarks.harness.tables import CPU, RESULTS, TABLES, everything, read, regenerate, table

README = Path(__file__).resolve().parents[2] / "README.md"


def run(**changes: Any) -> dict[str, Any]:
    result = {
        "name": "test_step.py::test_aggregated_step[mgda-bce-4]", "group": "step",
        "params": {"rule": "mgda", "loss": "bce", "num_strata": 4},
        "ratio": 1.111, "low": 1.1, "high": 1.2, "candidate_ms": 2.0,
    }  # fmt: skip
    other = {"name": "test_rules.py::test_gram_rule[mgda-4]", "group": "rules", "params": {},
             "microseconds": 12.345}  # fmt: skip
    return {
        "command": "make bench", "started_at": "2026-01-02T03:04:05+00:00",
        "commit": {"id": "abc", "dirty": False},
        "machine": {"device": "a CPU, 2 cores", "threads": 2, "load": 0.5},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.3.5", "numba": None},
        "results": [result, other],
        "skipped": [{"name": "test_x.py::test_step_of[Peer-4]", "reason": "not installed"}],
        "failed": [],
    } | changes  # fmt: skip


def results(folder: Path, content: dict[str, Any]) -> Path:
    (folder / CPU).write_text(json.dumps(content))
    return folder


def test_readme_holds_what_the_results_say() -> None:
    text = README.read_text()
    assert text.count("<!-- table: ") >= 3
    assert regenerate(text) == text


def test_committed_results_are_whole() -> None:
    committed = read()
    assert not committed["failed"]
    assert (RESULTS / CPU).with_suffix(".md").read_text() == everything(committed)
    for name in TABLES:
        assert "|" in table(name)


def test_steps_of_the_reference_backend_have_rows_of_their_own() -> None:
    other = {
        "name": "test_step.py::test_aggregated_step_of_the_reference_backend[aggregation-mgda-8]",
        "group": "step", "params": {"ops": "aggregation", "rule": "mgda", "num_strata": 8},
        "ratio": 1.3, "low": 1.2, "high": 1.4, "candidate_ms": 2.0,
    }  # fmt: skip
    made = TABLES["step"](run(results=[run()["results"][0], other]))
    assert "| `mgda` | BCE | 1.11 [1.10, 1.20] | - |" in made
    assert "| `mgda`, reference backend but for attention | BCE | - | 1.30 [1.20, 1.40] |" in made


def test_a_marked_table_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    text = "before\n<!-- table: step -->\nold\n<!-- /table -->\nafter\n"
    made = regenerate(text, results(tmp_path, run()))
    assert made.startswith("before\n<!-- table: step -->\n")
    assert made.endswith("<!-- /table -->\nafter\n")
    assert "| `mgda` | BCE | 1.11 [1.10, 1.20] |" in made
    assert "old" not in made
    for fact in ("a CPU, 2 cores", "torch 2.13.0", "commit abc;", "2026-01-02", "`make bench`"):
        assert fact in made
    assert regenerate(made, tmp_path) == made


def test_changed_figures_change_the_table(tmp_path: Path) -> None:
    text = "<!-- table: group step -->\n<!-- /table -->\n"
    before = regenerate(text, results(tmp_path, run()))
    assert "`aggregated_step` | rule=mgda, loss=bce, num_strata=4 | 1.11 [1.10, 1.20] |" in before
    changed = run(commit={"id": "abd", "dirty": True})
    changed["results"][0]["ratio"] = 1.15
    after = regenerate(before, results(tmp_path, changed))
    assert "1.15 [1.10, 1.20]" in after
    assert "commit abd with local changes" in after


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: steps -->\n<!-- /table -->", "expected one of step"),
        ("<!-- table: step -->\nopen", "no `<!-- /table -->`"),
        ("<!-- table: group nothing -->\n<!-- /table -->", "run make bench"),
    ],
)
def test_a_wrong_marker_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regenerate(text, results(tmp_path, run()))


def test_everything_names_skips_and_figures_without_a_reference() -> None:
    text = everything(run(failed=["test_y.py::test_broken"]))
    for part in ("## step", "microseconds 12.3", "| not installed |", "- `test_y.py::test_broken`"):
        assert part in text


def test_a_ratio_turned_round_keeps_its_interval() -> None:
    result = {"ratio": 0.5, "low": 0.4, "high": 0.8}
    assert span(result) == "0.50 [0.40, 0.80]"
    assert inverse(result) == "2.00 [1.25, 2.50]"
    assert span(None) == inverse(None) == "-"
