from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pytest

from pinet_fast.data import prepare, read_log
from pinet_fast.errors import ConfigError, DataError

USERS, ITEMS, TIMES = [3, 3, 1], [10, 20, 10], [5, 6, 7]
GOOD = {"user": USERS, "item": ITEMS, "timestamp": TIMES}


def ints(values):
    return pa.array(values, pa.int64())


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_reads_the_three_columns_and_no_other(write_log, suffix):
    log = read_log(write_log({"note": ["a", "b", "c"], **GOOD}, suffix))
    assert log.users.tolist() == USERS
    assert log.items.tolist() == ITEMS
    assert log.timestamps.tolist() == TIMES
    assert {log.users.dtype, log.items.dtype, log.timestamps.dtype} == {np.dtype(np.int64)}
    assert log.num_events == 3
    assert not log.simulated


def test_reads_renamed_columns(write_log):
    path = write_log({"uid": USERS, "movie.id": ITEMS, "ts": TIMES})
    log = read_log(path, user="uid", item="movie.id", timestamp="ts")
    assert log.items.tolist() == ITEMS
    assert log.timestamps.tolist() == TIMES


def test_order_says_whether_times_count(write_log):
    timed, untimed = write_log(GOOD), write_log({"user": USERS, "item": ITEMS})
    assert read_log(timed, order="rows").timestamps is None
    assert read_log(timed, order="timestamp").timestamps is not None
    assert read_log(untimed).timestamps is None
    with pytest.raises(ConfigError, match="order: expected one of auto, timestamp, rows"):
        read_log(timed, order="row")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1.0, 2.0, 3.0]),
        pa.array([1, 2, 3], pa.uint8()),
        pa.array([1, 2, 3], pa.int32()).dictionary_encode(),
        pa.array([1, 2, 3], pa.float32()),
    ],
    ids=str,
)
def test_whole_numbers_of_any_type_are_ids(write_log, column):
    assert read_log(write_log({**GOOD, "user": column})).users.tolist() == [1, 2, 3]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_hashes_are_ids(write_log, suffix):
    """Signed or unsigned, over the whole range of 64 bits."""
    users, items = [-(2**63), -2, 2**63 - 1], [2**64 - 2, 2**63, 5]
    columns = {"user": pa.array(users), "item": pa.array(items, pa.uint64())}
    log = read_log(write_log(columns, suffix))
    assert log.users.tolist() == users
    assert log.items.tolist() == items


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (pa.array([1.5, 2.5, 3.5]), np.float64),
        (pa.array([1, 2, 3], pa.timestamp("us", tz="UTC")), np.int64),
        (pa.array([1, 2, 3], pa.date32()), np.int64),
        (pa.array([0, 86_400_000, 172_800_000], pa.date64()), np.int64),
        (pa.array([1, 2, 3], pa.uint16()), np.int64),
    ],
    ids=str,
)
def test_times_may_be_numbers_timestamps_or_dates(write_log, column, dtype):
    times = read_log(write_log({**GOOD, "timestamp": column})).timestamps
    assert times.dtype == dtype
    assert (np.diff(times) > 0).all()


def test_csv_dates_are_times(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("user,item,timestamp\n1,2,2020-01-02\n1,3,2020-01-01\n", encoding="utf-8")
    assert np.diff(read_log(path).timestamps).tolist() == [-1]


BAD_COLUMNS = [
    (
        "wrong columns",
        {"uid": USERS, "items": ITEMS},
        {},
        ["no user column 'user'", "found 'uid', 'items'", "--user-col"],
    ),
    ("near name", {"user": USERS, "Items": ITEMS}, {}, ["--item-col Items"]),
    (
        "no time",
        {"user": USERS, "item": ITEMS},
        {"order": "timestamp"},
        ["no time column 'timestamp'", "--time-col", "--order rows"],
    ),
    (
        "renamed time",
        GOOD,
        {"timestamp": "time"},
        ["no time column 'time'", "--time-col timestamp"],
    ),
    ("one column twice", GOOD, {"item": "user"}, ["one column a role", "--item-col"]),
    (
        "null user",
        {**GOOD, "user": ints([1, None, None])},
        {},
        ["user column 'user'", "2 nulls", "row 2", "drop or fill"],
    ),
    (
        "null item",
        {**GOOD, "item": ints([None, 1, 2])},
        {},
        ["item column 'item'", "1 nulls", "row 1"],
    ),
    ("only nulls", {**GOOD, "item": pa.nulls(3)}, {}, ["3 nulls", "row 1"]),
    ("null time", {**GOOD, "timestamp": ints([1, None, 2])}, {}, ["1 nulls", "--order rows"]),
    ("nan id", {**GOOD, "item": pa.array([1.0, 2.0, np.nan])}, {}, ["integer ids", "nan in row 3"]),
    ("inf id", {**GOOD, "item": pa.array([1.0, np.inf, 3.0])}, {}, ["integer ids", "inf in row 2"]),
    ("fraction", {**GOOD, "user": pa.array([1.0, 2.5, 3.5])}, {}, ["2.5 in row 2", "2 such rows"]),
    ("inexact", {**GOOD, "user": pa.array([1.0, 1e17, 3.0])}, {}, ["2**53", "int64"]),
    ("boolean", {**GOOD, "user": [True, False, True]}, {}, ["type bool", "cast the column"]),
    ("none", {**GOOD, "item": ints([1, -1, 2])}, {}, ["other than -1", "-1 in row 2", "drop"]),
    (
        "none as float",
        {**GOOD, "item": pa.array([1.0, -1.0, 2.0])},
        {},
        ["other than -1", "-1.0 in row 2"],
    ),
    (
        "none as unsigned",
        {**GOOD, "item": pa.array([1, 2, 2**64 - 1], pa.uint64())},
        {},
        ["below 2**64 - 1", "row 3"],
    ),
    ("nan time", {**GOOD, "timestamp": [1.0, np.nan, 2.0]}, {}, ["finite times", "--order rows"]),
    ("inf time", {**GOOD, "timestamp": [1.0, -np.inf, 2.0]}, {}, ["finite times", "-inf in row 2"]),
    ("huge time", {**GOOD, "timestamp": pa.array([1, 2, 2**63], pa.uint64())}, {}, ["below 2**63"]),
    ("text time", {**GOOD, "timestamp": ["a", "b", "c"]}, {}, ["type string", "--order rows"]),
    ("no rows", {"user": ints([]), "item": ints([])}, {}, ["got 0 rows"]),
    ("many columns", {f"c{i}": USERS for i in range(30)}, {}, ["and 10 more"]),
]


def assert_one_line(message, path, fragments):
    assert "\n" not in message
    assert message.startswith(f"log {path}: ")
    assert ";" in message, "no fix"
    for fragment in fragments:
        assert fragment in message


def refused(path, store_dir, fragments, **options):
    """Check the message, and that neither the reader nor prepare leaves a file."""
    for call in (read_log, lambda p, **o: prepare(p, store_dir=store_dir, **o)):
        with pytest.raises(DataError) as caught:
            call(path, **options)
        assert_one_line(str(caught.value), path, fragments)
    assert not store_dir.exists()


@pytest.mark.parametrize(
    ("columns", "options", "fragments"),
    [case[1:] for case in BAD_COLUMNS],
    ids=[case[0] for case in BAD_COLUMNS],
)
def test_bad_columns_are_refused_in_one_line(write_log, tmp_path, columns, options, fragments):
    refused(write_log(columns), tmp_path / "stores", fragments, **options)


BAD_CSV = [
    ("empty file", "", ["found no column"]),
    ("only a header", "user,item\n", ["got 0 rows"]),
    ("double column", "user,item,user\n1,2,3\n", ["expected one column 'user', got 2", "rename"]),
    ("ragged row", "user,item\n1,2\n3\n", ["malformed CSV", "mend that line"]),
    ("tabs", "user\titem\n1\t2\n", ["separate the columns by commas"]),
    ("empty value", "user,item\n1,2\n,3\n", ["1 nulls", "row 2"]),
    ("fraction", "user,item\n1.5,2\n", ["1.5 in row 1"]),
    ("none", "user,item\n1,-1\n", ["-1 in row 1"]),
]


@pytest.mark.parametrize(
    ("text", "fragments"), [case[1:] for case in BAD_CSV], ids=[case[0] for case in BAD_CSV]
)
def test_bad_csv_is_refused_in_one_line(tmp_path, text, fragments):
    path = tmp_path / "log.csv"
    path.write_text(text, encoding="utf-8")
    refused(path, tmp_path / "stores", fragments)


def test_double_columns_in_parquet_are_refused(write_log, tmp_path):
    table = pa.Table.from_arrays(
        [ints(USERS), ints(ITEMS), ints(ITEMS)], names=["user", "item", "item"]
    )
    refused(write_log(table), tmp_path / "stores", ["expected one column 'item', got 2"])


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_cut_off_parquet_is_refused(write_log, tmp_path, keep):
    path = tmp_path / "cut.parquet"
    path.write_bytes(write_log(GOOD).read_bytes()[:keep])
    refused(path, tmp_path / "stores", ["not a whole Parquet file", "write or download it again"])


def test_foreign_parquet_is_refused(tmp_path):
    path = tmp_path / "foreign.parquet"
    path.write_bytes(b"user,item\n" + b"1,2\n" * 100)
    refused(path, tmp_path / "stores", ["not a whole Parquet file"])


def test_paths_that_are_no_log_are_refused(tmp_path):
    stores = tmp_path / "stores"
    folder = tmp_path / "folder.parquet"
    folder.mkdir()
    refused(folder, stores, ["expected a file or a folder of .parquet files"])
    refused(tmp_path / "missing.csv", stores, ["no such file", "check the path"])
    other = tmp_path / "log.json"
    other.write_text("{}", encoding="utf-8")
    refused(other, stores, [".parquet, .csv, .jsonl", "'.json'"])


def test_file_without_permission_is_refused(write_log, tmp_path, monkeypatch):
    path = write_log(GOOD)
    if os.geteuid() == 0:  # root may read everything

        def denied(*_args, **_kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.open", denied)
    else:
        path.chmod(0)
    refused(path, tmp_path / "stores", ["cannot be opened (Permission denied)", "permissions"])
