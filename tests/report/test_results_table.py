"""The table of runs beside published figures, and the file of figures."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from pinet_fast.errors import ConfigError
from pinet_fast.report import RunFiles, RunSummary
from pinet_fast.report.results_table import (
    as_clicks_table,
    as_dicts,
    as_rich_table,
    as_table_csv,
    published_figures,
    results_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_every_figure_names_its_protocol_and_source() -> None:
    figures = published_figures()
    keys = [(f.data, f.model, f.loss) for f in figures]
    assert len(set(keys)) == len(keys)
    for figure in figures:
        assert len(figure.protocol) > 10
        assert len(figure.source) > 5
        assert all(0 < value < 1 for value in figure.values.values())
        assert figure.values["ndcg@10"] < figure.values["hr@10"]
    values = {key: f.values["ndcg@10"] for key, f in zip(keys, figures, strict=True)}
    assert values["amazon-beauty-5core", "sasrec", "bce"] == 0.0318
    assert values["ml-1m", "sasrec", "bce"] == 0.1341


def loaded(make_run: Callable[..., Path], **fields: Any) -> RunFiles:
    return RunFiles.load(make_run(**fields))


def test_seeds_are_averaged_and_stand_beside_the_figure(make_run: Callable[..., Path]) -> None:
    beauty = {"data": "amazon-beauty-5core.parquet", "loss": "bce", "heads": False}
    runs = [
        loaded(make_run, name=f"s{seed}", seed=seed, quality=0.1 * seed, **beauty)
        for seed in range(3)
    ]
    runs.append(loaded(make_run, name="ce", data="amazon-beauty-5core.parquet", loss="ce"))
    runs.append(loaded(make_run, name="other", data="mine.parquet", fingerprint="cd" * 32))
    rows = results_rows(runs)
    assert [(r.data, r.loss, r.runs) for r in rows] == [
        ("amazon-beauty-5core", "bce", 3), *[("amazon-beauty-5core", "ce", 1)] * 2,
        *[("mine", "ce", 1)] * 2,
    ]  # fmt: skip
    own = [run.test["backbone"].overall.metrics["ndcg@10"].mean for run in runs[:3]]
    assert rows[0].means["ndcg@10"] == pytest.approx(sum(own) / 3)  # type: ignore[arg-type]
    assert rows[0].ranges["ndcg@10"] == (min(own), max(own))  # type: ignore[type-var]
    assert rows[0].published is not None
    assert rows[0].published.values == {"ndcg@10": 0.0318, "hr@10": 0.0605}
    assert rows[3].published is None
    assert [row.rule for row in rows[1:3]] == ["agreement", "agreement + plugin heads"]
    for row, stage in zip(rows[1:3], ("backbone", "heads"), strict=True):
        found = runs[3].test[stage].overall.metrics["ndcg@10"].mean
        assert row.means["ndcg@10"] == pytest.approx(found)
    assert as_dicts(rows)[0]["ratio"] == pytest.approx(rows[0].means["ndcg@10"] / 0.0318)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(as_rich_table(rows))
    text = console.export_text()
    assert "0.0318 [1]" in text
    assert "CIKM2020-S3Rec" in text
    lines = list(csv.DictReader(io.StringIO(as_table_csv(rows))))
    assert [line["published_ndcg@10"] for line in lines] == ["0.0318", *["0.0375"] * 2, "", ""]
    assert float(lines[0]["ndcg@10_low"]) == min(own)  # type: ignore[type-var]


def test_other_options_and_protocols_are_other_rows(make_run: Callable[..., Path]) -> None:
    data = "amazon-beauty-5core.parquet"
    sampled = loaded(make_run, name="a", data=data, extra_config={"eval_negatives": 100})
    wide = loaded(make_run, name="b", data=data, extra_config={"dim": 128})
    again = loaded(make_run, name="c", data=data, seed=1, extra_config={"dim": 128, "threads": 2})
    rows = results_rows([sampled, wide, again])
    assert [(r.protocol, r.runs, r.published is None) for r in rows] == [
        *[("100 uniform", 1, True)] * 2, *[("full", 2, False)] * 2,
    ]  # fmt: skip


def test_a_copy_of_the_metrics_is_enough(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(name="a", heads=True)
    copy = tmp_path / "seed-0.json"
    copy.write_bytes((folder / "metrics.json").read_bytes())
    whole, alone = RunFiles.load(folder), RunSummary.load(copy)
    assert as_dicts(results_rows([alone])) == as_dicts(results_rows([whole]))
    assert alone.clicks == {}
    assert as_clicks_table(results_rows([alone])) is None
    with pytest.raises(ConfigError, match="is a file; expected a run folder"):
        RunFiles.load(copy)
    copy.write_text("{}")
    with pytest.raises(ConfigError, match="'schema' is missing"):
        RunSummary.load(copy)


def test_candidates_stand_beside_popularity(make_run: Callable[..., Path]) -> None:
    def clicks(auc: float, gauc: float) -> dict[str, Any]:
        group = {
            "users": 10,
            "auc": {"mean": auc, "low": 0.1, "high": 0.9},
            "gauc": {"mean": gauc, "low": 0.1, "high": 0.9},
        }
        return {"overall": group, "strata": [group, group]}

    runs = []
    for seed in range(2):
        folder = make_run(name=f"din-{seed}", seed=seed, heads=False)
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["clicks"] = {"test": {"backbone": clicks(0.8 + 0.02 * seed, 0.7)}, "valid": {}}
        metrics["baselines"] = {"popularity": {"clicks": clicks(0.6, 0.5)}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        runs.append(RunSummary.load(folder))
    (row,) = results_rows(runs)
    assert row.clicks == pytest.approx(
        {"auc": 0.81, "gauc": 0.7, "popularity_auc": 0.6, "popularity_gauc": 0.5}
    )
    table = as_clicks_table([row])
    assert table is not None
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    assert re.search(r"2\s+0.8100\s+0.6000\s+0.7000\s+0.5000", console.export_text())
