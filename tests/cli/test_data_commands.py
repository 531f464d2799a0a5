"""prepare, inspect, fetch and doctor, as users meet them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from pinet_fast.cli.main import main
from pinet_fast.data import datasets, simulate_log

if TYPE_CHECKING:
    from pathlib import Path

# users, items, events, mean, quartiles, p90, p99, max, top users %, Gini, top items %, tie share %
PUBLISHED = {
    "ml-1m": (6040, 3416, 999_611, 165.5, 18, (44, 96, 207.2), 400, 906, 2277, 57.2, 0.529, 62.6),
    "ml-100k": (943, 1682, 100_000, 106.04, 20, (33, 65, 148), 244.4, 442.5, 737,
                51.5, 0.472, 64.6),
    "amazon-beauty-sasrec": (52_204, 57_289, 394_908, 7.56, 1, (5, 6, 8), 13, 37, 293,
                             43.8, 0.339, 67.8),
    "amazon-beauty-bert4rec": (40_226, 54_542, 353_962, 8.8, 5, (5, 6, 9), 14, 41, 293,
                               42.4, 0.305, 68.4),
    "amazon-beauty-5core": (22_363, 12_101, 198_502, 8.88, 5, (5, 6, 9), 14, 43, 204,
                            43.0, 0.310, 58.1),
    "amazon-sports-5core": (35_598, 18_357, 296_337, 8.32, 5, (5, 6, 9), 13, 32, 296,
                            39.6, 0.272, 56.8),
    "amazon-home-5core": (66_519, 28_237, 551_682, 8.29, 5, (5, 6, 9), 13, 35, 277,
                          40.4, 0.278, 60.2),
    "amazon-music-melt": (20_165, 20_356, 132_595, 6.58, 1, (2, 4, 7), 12, 45.4, 714,
                          55.2, 0.503, 64.9),
    "yelp-5core": (30_431, 20_033, 316_354, 10.4, 5, (5, 7, 11), 19, 54, 350, 46.8, 0.361, 53.5),
}  # fmt: skip
TIES = {"ml-100k": 0.44, "amazon-beauty-5core": 0.43, "amazon-sports-5core": 0.45,
        "amazon-music-melt": 0.28, "yelp-5core": 0.0}  # fmt: skip
BELOW_3 = {"amazon-beauty-sasrec": 1706, "amazon-music-melt": 5371}


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


@pytest.mark.real_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_inspect_agrees_with_what_is_known(
    name: str, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = "rows" if name == "ml-1m" else "auto"
    path = real_data / f"{name}.parquet"
    assert run("inspect", path, "--order", order, "--store-dir", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    users, items, events, mean, least, quartiles, p90, p99, most, *shares = PUBLISHED[name]
    assert (found["users"], found["items"], found["events"]) == (users, items, events)
    per_user = found["events_per_user"]
    assert per_user["mean"] == pytest.approx(mean, abs=0.051)
    assert (per_user["min"], per_user["max"]) == (least, most)
    assert [per_user[q] for q in ("q25", "q50", "q75")] == pytest.approx(quartiles, abs=0.051)
    assert [per_user["p90"], per_user["p99"]] == pytest.approx([p90, p99], abs=0.51)
    got = [100 * found["top_share_users"], found["gini_users"], 100 * found["top_share_items"]]
    # One user or item more or less in the fifth, where a fifth is no whole number, is 0.01 here.
    assert got[0::2] == pytest.approx(shares[0::2], abs=0.07)
    assert got[1] == pytest.approx(shares[1], abs=0.00051)
    assert found["repeated_pairs"] == (11_830 if name == "yelp-5core" else 0)
    assert found["users_below_3_events"] == BELOW_3.get(name, 0)
    if name in TIES:
        assert found["time_tie_share"] == pytest.approx(TIES[name], abs=0.0051)
    elif name != "ml-1m":
        assert found["time_ties"] is None
    assert sum(row["users"] for row in found["strata"]) == users


def test_prepare_says_what_it_did(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--store-dir", tmp_path, "--min-user-events", "8", "--memory-limit", "200MB"]
    assert run("prepare", log, *options) == 0
    shown = capsys.readouterr().out
    assert "SIMULATED DATA" in shown
    assert "rows dropped: users with fewer than 8" in shown
    assert "no user's last two events tie" in shown
    store = next(tmp_path.glob("*.arrow"))
    assert f"store: {store} (" in shown
    assert run("prepare", log, *options, "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["store"] == str(store)
    assert about["rows_dropped"] > 0
    assert run("inspect", store, "--json") == 0
    assert json.loads(capsys.readouterr().out)["events"] == about["events"]


def test_ties_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    table = pa.table({"user": ["a", "a", "b"], "item": [1, 2, 1], "timestamp": [5, 5, 6]})
    pyarrow.csv.write_csv(table, path)
    assert run("prepare", path, "--store-dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert "ties in the order of the rows: for 1 users (50%)" in said
    assert run("prepare", path, "--store-dir", tmp_path, "--order", "rows") == 0
    assert "the order of the rows is the sequence" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_inspect_shows_the_tail(
    suffix: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "100")
    plot = tmp_path / f"tail{suffix}"
    arguments = [log, "--store-dir", tmp_path, "--strata", "quantile:3", "--plot", plot]
    assert run("inspect", *arguments) == 0
    shown = capsys.readouterr().out
    for part in ("SIMULATED DATA", "Gini of users", "top 20% of items", "quartiles", "p99",
                 "tied at the border", "quantile:3", "fewer than 3"):  # fmt: skip
        assert part in shown
    assert plot.stat().st_size > 1000


def test_inspect_of_a_log_without_strata(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.parquet"
    pa.parquet.write_table(pa.table({"user": [1, 2], "item": [1, 2]}), path)
    assert run("inspect", path, "--store-dir", tmp_path) == 0
    assert "no strata: " in capsys.readouterr().out
    assert run("inspect", path, "--store-dir", tmp_path, "--strata", "quantile:2") == 2


def test_bad_arguments_are_one_line(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, match in (
        (["inspect", log, "--plot", "tail.pdf"], ".png or .svg"),
        (["inspect", tmp_path / "none.arrow"], "no such file"),
        (["prepare", tmp_path], "without any"),
        (["prepare", log, "--memory-limit", "lots"], "2GB"),
        (["prepare", log, "--order", "random"], "order: expected one of"),
        (["fetch", "ml-2m"], "expected one of ml-100k"),
        (["fetch", "ml-100k"], "--accept-licence"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert match in error
        assert "\n" not in error


def test_fetch_lists_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("fetch") == 0
    assert "first use" in capsys.readouterr().out
    assert run("fetch", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == set(datasets.DATASETS)
    source = tmp_path / "there.txt"
    source.write_text("1 2\n1 3\n")
    one = datasets.Dataset(source.as_uri(), None, "ask first")
    monkeypatch.setitem(datasets.DATASETS, "toy", one)
    monkeypatch.setattr(datasets, "_download", lambda n, u, part, r: source.rename(part))
    assert run("fetch", "toy", "--dir", tmp_path / "data", "--accept-licence") == 0
    shown = capsys.readouterr().out
    for part in ("licence: ask first", "not pinned: trusted on first use", "toy.parquet"):
        assert part in shown
    assert run("fetch", "toy", "--dir", tmp_path / "data", "--accept-licence") == 0
    assert "the same as at the first download" in capsys.readouterr().out
    assert run("fetch", "toy", "--dir", tmp_path / "data", "--accept-licence", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pinned"] is False


def test_doctor_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["reference"] == {"serves": True, "reason": None}
    assert all(state["serves"] or state["reason"] for state in found["backends"].values())
    assert found["lane"]["serves"] or found["lane"]["reason"]
    assert 0.1 < found["copy_gb_per_s"] < 1000
    assert 0.5 < found["random_line_ns"] < 2000
    assert found["floor_ns_per_row"]["30"] < found["floor_ns_per_row"]["200"]
    assert 0 < found["sampler_eta"] < 10
    assert found["sampler_ns_per_row"] > 0
    assert found["versions"]["duckdb"]
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert "sampler floor" in shown
    assert "eta " in shown
    assert "compiled lane" in shown


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("prepare", "inspect", "fetch", "doctor"):
        assert run(command, "--help") == 0
        assert f"pinet-fast {command}" in capsys.readouterr().out.split("Example", 1)[1]
