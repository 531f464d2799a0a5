"""Original ids are there again, whatever they were."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pinet_fast.data import SequenceStore, StringIds, prepare
from pinet_fast.data.store import checked_arrays
from pinet_fast.errors import DataError

WORDS = pa.table(
    {"user": [f"ü{n % 40}" for n in range(900)], "item": [f"{n * 7 % 83}-Ж" for n in range(900)]}
)


def test_string_ids_come_back(tmp_path):
    store = SequenceStore.open(prepare(WORDS, store_dir=tmp_path).path)
    users, items = WORDS["user"].to_pylist(), WORDS["item"].to_pylist()
    assert isinstance(store.user_ids, StringIds)
    assert store.user_ids.tolist() == sorted(set(users))
    assert store.item_ids.tolist() == ["", *sorted(set(items))]
    for code in (1, 2, store.num_items):
        assert store.item_code(store.item_ids[code]) == code
    assert store.user_row(store.user_ids[3]) == 3
    assert store.item_ids[np.array([[1, 2], [3, -1]])].shape == (2, 2)
    assert store.item_ids[1:3].tolist() == sorted(set(items))[:2]
    assert store.user_ids[np.arange(store.num_users) < 2].tolist() == sorted(set(users))[:2]
    assert next(iter(store.user_ids)) == np.asarray(store.user_ids)[0]
    for wrong in ("none", 7, None):
        with pytest.raises(DataError, match=r"no item .*ids are strings.*check the id"):
            store.item_code(wrong)


def test_integer_ids_come_back(store_of):
    store = store_of([3, 3, 1], [7, 2**40, 7])
    assert [store.item_code(7), store.item_code(2**40), store.user_row(np.int64(3))] == [1, 2, 1]
    for wrong in (8, -1, 2**64, "7", True, 7.0):
        with pytest.raises(DataError, match="ids are integers"):
            store.item_code(wrong)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_hashed_ids_come_back(write_log, tmp_path, suffix):
    """What hash functions give: 64 bits, signed or not, sorted as numbers."""
    users = [-(2**63), 2**63 - 1, -(2**63), 7]
    items = [2**64 - 2, 5, 2**63, 2**64 - 2]
    columns = {"user": pa.array(users), "item": pa.array(items, pa.uint64())}
    store = SequenceStore.open(prepare(write_log(columns, suffix), store_dir=tmp_path).path)
    assert store.user_ids.tolist() == [-(2**63), 7, 2**63 - 1]
    assert store.item_ids.tolist() == [2**64 - 1, 5, 2**63, 2**64 - 2]
    assert store.item_ids[store.items].tolist() == [2**64 - 2, 2**63, 2**64 - 2, 5]
    for code in (1, 2, 3):
        assert store.item_code(int(store.item_ids[code])) == code
        assert store.user_row(int(store.user_ids[code - 1])) == code - 1
    for wrong in (2**64 - 1, 2**64, 2**63 + 1, -1, 0):
        with pytest.raises(DataError, match="ids are integers, 5 to 18446744073709551614"):
            store.item_code(wrong)


def test_opening_strings_allocates_nothing(tmp_path):
    path = prepare(WORDS, store_dir=tmp_path).path
    before = pa.total_allocated_bytes()
    store = SequenceStore.open(path, verify=False)
    assert pa.total_allocated_bytes() == before
    for array in checked_arrays(store).values():
        assert not array.flags.owndata
        assert not array.flags.writeable
