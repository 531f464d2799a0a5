"""Attributes of items from files of every kind, by the codes of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinet_fast.data import SequenceStore, item_attributes, prepare
from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> SequenceStore:
    """Items 10, 20, 30 of a log, in codes 1, 2, 3."""
    table = pa.table({"user": [1, 1, 1, 2, 2, 2], "item": [10, 20, 30, 30, 10, 20]})
    path = tmp_path / "log.parquet"
    pq.write_table(table, path)
    return prepare(path, order="rows", store_dir=tmp_path / "stores")


def written(folder: Path, **columns: list[object]) -> Path:
    path = folder / "items.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_lists_are_numbered_in_order_of_their_values(store: SequenceStore, tmp_path: Path) -> None:
    path = written(
        tmp_path, item=[30, 10, 99, None], attributes=[[7, 3, 3], [12], [1], [5]]
    )  # item 99 and its attribute 1 are not of the log; item 20 has none
    got = item_attributes(store, path)
    assert got.tolist() == [[0, 0], [3, 0], [0, 0], [1, 2]]


def test_texts_are_split_and_single_values_taken(store: SequenceStore, tmp_path: Path) -> None:
    path = written(tmp_path, movie=[10, 20, 30], genres=["Drama|Comedy", "Action", None])
    got = item_attributes(store, path, item="movie")
    assert got.tolist() == [[0, 0], [2, 3], [1, 0], [0, 0]]
    csv = tmp_path / "items.csv"
    csv.write_text("item,category\n10,4\n20,4\n30,2\n")
    assert item_attributes(store, csv).tolist() == [[0], [2], [2], [1]]
    assert item_attributes(store, csv, attributes="category").shape == (4, 1)


def test_bad_files_are_named(store: SequenceStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        item_attributes(store, tmp_path / "missing.csv")
    with pytest.raises(ConfigError, match=r"\.parquet or \.csv"):
        item_attributes(store, tmp_path / "items.xlsx")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        item_attributes(store, damaged)
    with pytest.raises(DataError, match="no column 'item' of item ids; it has id"):
        item_attributes(store, written(tmp_path, id=[1], genres=["a"]))
    with pytest.raises(DataError, match="no column None of attributes"):
        item_attributes(store, written(tmp_path, item=[10], colour=["a"]))
    with pytest.raises(DataError, match=r"no item of log\.parquet has an attribute"):
        item_attributes(store, written(tmp_path, item=[77], genres=["a"]))
    with pytest.raises(DataError, match="holds float"):
        item_attributes(store, written(tmp_path, item=[10], genres=[0.5]))
