"""Scaling curves: exponents, peaks of memory, and a whole small run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scaling
from benchmarks.harness.curves import exponent
from benchmarks.harness.memory import allocations, peak_bytes
from benchmarks.harness.tables import table
from pinet_fast import GradientAggregator

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SMALL = scaling.Point(B=8, L=4, d=8, V=50)


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(deadline=None)
@given(power=st.floats(-2, 3), scale=st.floats(0.1, 100))
def test_the_exponent_of_a_power_law_is_found(power: float, scale: float) -> None:
    sizes = [1, 2, 8, 64]
    assert exponent(sizes, [scale * x**power for x in sizes]) == pytest.approx(power, abs=1e-9)
    assert exponent([1], [scale]) is None


def test_a_peak_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for size in (1000, 500):
            torch.empty(size, dtype=torch.uint8)

    def together() -> list[torch.Tensor]:
        return [torch.empty(size, dtype=torch.uint8) for size in (1000, 500)]

    assert peak_bytes(one_after_the_other) == 1000
    assert peak_bytes(together) == 1500
    assert [size for size in allocations(together) if size > 0] == [1000, 500]
    assert peak_bytes(lambda: None) == 0


def test_a_small_run_writes_figures_fits_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "BASE", SMALL)
    sizes = {"S": (1, 4), "V": (50, 10**13), "rule": ("backdoor", "trimmedmean")}
    monkeypatch.setattr(scaling, "SIZES", sizes)
    scaling.main(["--seconds", "0.01", "--out", str(tmp_path)])
    assert "V = 10000000000000: left out" in capsys.readouterr().out
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert [p["x"] for p in content["curves"]["S"]] == [1, 4]
    assert [p["x"] for p in content["curves"]["V"]] == [50]
    assert all(p["ratio"] > 0 and p["peak_bytes"] > 0 for p in content["curves"]["S"])
    assert set(content["exponents"]["S"]) >= {"candidate_ms", "reference_ms", "peak_bytes"}
    assert content["exponents"]["rule"] == {}
    svg = (tmp_path / "scaling.svg").read_text()
    assert svg.startswith("<?xml")
    scaling.draw(content["curves"], tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == svg


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = scaling.batch_of(SMALL)
    balanced = scaling.Point(B=8, L=4, d=8, V=50, rule="balanced")
    scaling.check(balanced, batch)

    class Wrong(GradientAggregator):
        def backward(self, losses: torch.Tensor, weights: torch.Tensor | None = None) -> None:
            super().backward(losses, weights)
            self.param_groups[0]["params"][0].grad.mul_(1.01)

    monkeypatch.setattr(scaling, "GradientAggregator", Wrong)
    with pytest.raises(AssertionError):
        scaling.check(balanced, batch)


def test_a_table_names_the_ends_of_every_curve(tmp_path: Path) -> None:
    point = {"ratio": 1.1, "low": 1.0, "high": 1.2, "memory_ratio": 1.5}
    content = {
        "command": "make scaling", "started_at": "2026-01-02T03:04:05+00:00",
        "commit": {"id": "abc", "dirty": False}, "versions": {"torch": "2.13.0"},
        "machine": {"device": "a CPU", "threads": 1, "load": 0.5},
        "curves": {"S": [{"x": 1} | point, {"x": 64} | point]},
        "exponents": {"S": {"candidate_ms": 0.25, "reference_ms": 0.0}},
    }  # fmt: skip
    (tmp_path / "scaling.json").write_text(json.dumps(content))
    made = table("scaling", tmp_path)
    assert "| S: 1 to 64 | 1.10 [1.00, 1.20] | 1.10 [1.00, 1.20] | 0.25 | 0.00 |" in made
    assert "1.50 to 1.50" in made
