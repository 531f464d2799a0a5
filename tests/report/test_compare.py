from __future__ import annotations

import csv
import io
import json
import time

import numpy as np
import pytest
from rich.console import Console

from pinet_fast.errors import ConfigError
from pinet_fast.report import Comparison, RunFiles, as_csv, as_dict, as_rich


def printed(comparison, width=100):
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    for table in as_rich(comparison):
        console.print(table)
    return console.file.getvalue()


def plain(comparison):
    console = Console(width=100, file=io.StringIO())
    for table in as_rich(comparison):
        console.print(table)
    return console.file.getvalue()


def with_ranks(folder, backbone, strata, users=None):
    """Give a run without heads these ranks, and the metrics that follow from them by hand."""
    size = len(backbone)
    arrays = {
        "users": np.arange(size) if users is None else np.asarray(users),
        "strata": np.asarray(strata),
        "activeness": np.full(size, 5),
        "backbone": np.asarray(backbone),
    }
    np.savez(folder / "test_ranks.npz", **arrays)
    path = folder / "metrics.json"
    content = json.loads(path.read_text())
    evaluation = content["test"]["backbone"]
    masks = [np.ones(size, bool), arrays["strata"] == 0, arrays["strata"] == 1]
    for group, mask in zip([evaluation["overall"], *evaluation["strata"]], masks, strict=True):
        hits = arrays["backbone"][mask] <= 10
        gain = hits / np.log2(arrays["backbone"][mask] + 1)
        group["users"] = int(mask.sum())
        group["ndcg@10"]["mean"] = float(gain.mean())
        group["hr@10"]["mean"] = float(hits.mean())
    path.write_text(json.dumps(content))
    return RunFiles.load(folder)


@pytest.fixture
def by_hand(make_run):
    """Return two runs of six users: three of the tail, three of the head."""
    fields = {"rule": "joint", "heads": False}
    strata = [0, 0, 0, 1, 1, 1]
    first = with_ranks(make_run(name="joint", **fields), [1, 3, 50, 1, 7, 99], strata)
    # The same users in another order, so that pairing has to find them.
    order = np.array([5, 3, 1, 0, 2, 4])
    ranks, users = np.array([1, 1, 3, 1, 7, 11]), np.arange(6)
    second = with_ranks(
        make_run(name="other", **fields), ranks[order], np.array(strata)[order], users[order]
    )
    return Comparison.of([first, second])


def test_numbers_by_hand(by_hand):
    overall, tail, head = (row[1] for row in by_hand.cells["ndcg@10"])
    # NDCG of rank 1, 3, 7 is 1, 1/2, 1/3; beyond 10 it is 0.
    assert by_hand.cells["ndcg@10"][1][0].value.mean == pytest.approx((1 + 0.5) / 3)
    assert tail.value.mean == pytest.approx((1 + 1 + 0.5) / 3)
    assert tail.difference.mean == pytest.approx(1 / 3)
    assert tail.relative == pytest.approx((1 / 3) / 0.5)
    assert head.difference.mean == pytest.approx(0)
    assert overall.difference.mean == pytest.approx(1 / 6)
    assert by_hand.cells["hr@10"][1][1].difference.mean == pytest.approx(1 / 3)


def test_pairs_are_found_in_any_order(by_hand):
    tail, head = by_hand.cells["ndcg@10"][1][1], by_hand.cells["ndcg@10"][2][1]
    # The users' own differences are 0, 1/2, 1/2 in the tail and all 0 in the head.
    assert tail.difference.low == pytest.approx(0)
    assert tail.difference.high == pytest.approx(0.5)
    assert (head.difference.low, head.difference.high) == (0, 0)


def test_baseline_has_no_difference(by_hand):
    cell = by_hand.cells["ndcg@10"][0][0]
    assert cell.difference.mean is None
    assert cell.relative is None


def test_intervals_belong_to_the_differences(make_run):
    runs = [
        RunFiles.load(make_run(name="joint", rule="joint", heads=False, users=3000)),
        RunFiles.load(make_run(name="agreement", users=3000)),
    ]
    for rows in Comparison.of(runs).cells.values():
        for row in rows:
            difference = row[1].difference
            assert difference.low <= difference.mean <= difference.high


def test_twenty_five_thousand_users_take_less_than_two_seconds(make_run):
    runs = [RunFiles.load(make_run(name=name, users=25_000, log_steps=1)) for name in "ab"]
    started = time.perf_counter()
    Comparison.of(runs)
    assert time.perf_counter() - started < 2


def test_other_log_is_refused(make_run):
    runs = [RunFiles.load(make_run(name=name, fingerprint=name * 64)) for name in "ab"]
    with pytest.raises(ConfigError, match="another log"):
        Comparison.of(runs)


@pytest.mark.parametrize("other", [{"num_strata": 3}, {"names": ("low", "high")}])
def test_other_strata_are_refused(make_run, other):
    runs = [RunFiles.load(make_run(name="a")), RunFiles.load(make_run(name="b", **other))]
    with pytest.raises(ConfigError, match="other strata"):
        Comparison.of(runs)


def test_one_run_is_refused(make_run):
    with pytest.raises(ConfigError, match="two runs or more, got 1"):
        Comparison.of([RunFiles.load(make_run())])


def test_other_options_are_noted(make_run):
    first = RunFiles.load(make_run(name="a"))
    second = RunFiles.load(make_run(name="b", seed=1, loss="bce", extra_config={"new": True}))
    (note,) = Comparison.of([first, second]).notes
    for text in ("seed 1 (baseline: 0)", "loss bce (baseline: ce)", "new yes (baseline: unset)"):
        assert text in note


def test_other_users_have_no_intervals(make_run):
    runs = []
    for name in "ab":
        folder = make_run(name=name, rule="joint", heads=False)
        runs.append(with_ranks(folder, [1, 2, 3, 4], [0, 0, 1, 1], np.arange(4) + ord(name)))
    comparison = Comparison.of(runs)
    assert comparison.cells["ndcg@10"][0][1].difference.mean == 0
    assert comparison.cells["ndcg@10"][0][1].difference.low is None
    assert "other users" in comparison.notes[0]


def test_empty_stratum_stays_empty(make_run):
    runs = [RunFiles.load(make_run(name=n, num_strata=3, empty_strata=(1,))) for n in "ab"]
    comparison = Comparison.of(runs)
    assert comparison.users[2] == 0
    assert comparison.cells["ndcg@10"][2][1].difference.mean is None
    assert "-" in plain(comparison)


def test_equal_names_are_told_apart(make_run):
    run = RunFiles.load(make_run())
    above = run.path.parent.name
    assert Comparison.of([run, run]).labels == (f"{above}/agreement #1", f"{above}/agreement #2")


def test_runs_of_a_name_are_told_apart_by_the_folder_above(make_run, tmp_path):
    runs = []
    for name in ("joint", "own"):
        (tmp_path / name).mkdir()
        folder = make_run(name="seed-0").rename(tmp_path / name / "seed-0")
        runs.append(RunFiles.load(folder))
    assert Comparison.of(runs).labels == ("joint/seed-0", "own/seed-0")


@pytest.mark.parametrize("num_runs", [2, 3, 6])
def test_tables_fit_100_columns(make_run, num_runs):
    fields = {"num_strata": 5, "users": 3000, "simulated": True}
    runs = [RunFiles.load(make_run(name=f"run-{i}", seed=i, **fields)) for i in range(num_runs)]
    text = plain(Comparison.of(runs))
    assert max(map(len, text.splitlines())) <= 100
    for i in range(num_runs):
        assert f"run-{i}" in text
    assert "…" not in text
    assert "SIMULATED DATA" in text


def test_only_certain_differences_are_coloured(make_run):
    fields = {"rule": "joint", "heads": False, "users": 2000}
    base = RunFiles.load(make_run(name="base", **fields))
    same = RunFiles.load(make_run(name="same", **fields))
    better = RunFiles.load(make_run(name="better", **fields, quality=0.2))
    green, red = "\x1b[32m", "\x1b[31m"
    assert green not in printed(Comparison.of([base, same]))
    assert red not in printed(Comparison.of([base, same]))
    assert green in printed(Comparison.of([base, better]))
    assert red in printed(Comparison.of([better, base]))


def test_real_data_is_not_called_simulated(make_run):
    runs = [RunFiles.load(make_run(name=name)) for name in "ab"]
    assert "SIMULATED" not in plain(Comparison.of(runs))


def test_markup_in_names_is_text(make_run):
    runs = [RunFiles.load(make_run(name=name, names=("[red]t", "h"))) for name in ("[b]a", "b")]
    text = plain(Comparison.of(runs))
    assert "[b]a" in text
    assert "[red]t" in text


def test_json_holds_everything(by_hand):
    content = json.loads(json.dumps(as_dict(by_hand), allow_nan=False))
    assert content["baseline"] == "joint"
    assert [group["group"] for group in content["groups"]] == ["overall", "tail", "head"]
    cell = content["groups"][1]["metrics"]["ndcg@10"]["other"]
    assert cell["delta"] == pytest.approx(1 / 3)
    assert cell.keys() == {
        "mean", "low", "high", "delta", "delta_low", "delta_high", "relative", "p_value",
    }  # fmt: skip


def test_csv_holds_everything(by_hand):
    rows = list(csv.DictReader(io.StringIO(as_csv(by_hand))))
    assert len(rows) == 2 * 3 * 9
    row = next(
        r for r in rows if (r["run"], r["group"], r["metric"]) == ("other", "tail", "ndcg@10")
    )
    assert float(row["delta"]) == pytest.approx(1 / 3)
    assert next(r for r in rows if r["run"] == "joint")["delta"] == ""
