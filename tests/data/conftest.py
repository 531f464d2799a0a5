"""Builders of logs and stores; session-scoped, so that hypothesis may use them."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from pinet_fast.data import prepare


@pytest.fixture(scope="session")
def write_log(tmp_path_factory):
    """Return a function that writes columns as a new log and returns its path."""
    folder = tmp_path_factory.mktemp("logs")
    numbers = itertools.count()

    def write(columns, suffix=".parquet"):
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        path = folder / f"log{next(numbers)}{suffix}"
        if suffix == ".csv":
            pyarrow.csv.write_csv(table, path)
        else:
            pyarrow.parquet.write_table(table, path)
        return path

    return write


@pytest.fixture(scope="session")
def store_of(write_log, tmp_path_factory):
    """Return a function that prepares a store from users, items and, if given, times."""
    folder = tmp_path_factory.mktemp("stores")

    def build(users, items, timestamps=None, **options):
        columns = {"user": pa.array(users, pa.int64()), "item": pa.array(items, pa.int64())}
        if timestamps is not None:
            columns["timestamp"] = pa.array(timestamps)
        return prepare(write_log(columns), store_dir=folder, **options)

    return build


@pytest.fixture(scope="session")
def store_with_lengths(store_of):
    """Return a function that prepares random sequences of the given lengths."""

    def build(lengths, num_items=50, seed=0):
        rng = np.random.default_rng(seed)
        users = np.repeat(np.arange(len(lengths)), lengths)
        items = np.concatenate(
            [np.arange(num_items), rng.integers(0, num_items, max(0, len(users) - num_items))]
        )[: len(users)]
        return store_of(users, rng.permutation(items))

    return build
