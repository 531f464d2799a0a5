from __future__ import annotations

import contextlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import SequenceStore, prepare
from pinet_fast.data import _store_checks as layout
from pinet_fast.data.store import batch_of, checked_arrays, checksum
from pinet_fast.errors import DataError, StoreError

EVENTS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 5, 7, 2**40]),
        st.sampled_from([0, 2, 3, 9, 2**50]),
        st.integers(-3, 3),
    ),
    min_size=1,
    max_size=40,
)


def grouped(events, by_time):
    """Return {user: [(item, time)]} with plain sorting."""
    sequences = {}
    for user, item, time in events:
        sequences.setdefault(user, []).append((item, time))
    if by_time:
        for user, sequence in sequences.items():
            sequences[user] = sorted(sequence, key=lambda event: event[1])
    return sequences


@settings(deadline=None, max_examples=60)
@given(events=EVENTS, by_time=st.booleans(), as_float=st.booleans())
def test_store_equals_plain_grouping(store_of, events, by_time, as_float):
    users, items, times = zip(*events, strict=True)
    stamps = [float(t) if as_float else t for t in times]
    store = store_of(users, items, stamps, order="auto" if by_time else "rows")
    expected = grouped(events, by_time)
    assert store.user_ids.tolist() == sorted(expected)
    assert store.item_ids.tolist() == [-1, *sorted(set(items))]
    assert store.num_events == len(events)
    assert store.lengths().tolist() == [len(expected[u]) for u in sorted(expected)]
    for u, user in enumerate(store.user_ids.tolist()):
        start, end = store.offsets[u], store.offsets[u + 1]
        codes = store.items[start:end]
        assert store.item_ids[codes].tolist() == [item for item, _ in expected[user]]
        if by_time:
            assert store.timestamps[start:end].tolist() == [t for _, t in expected[user]]
    if by_time:
        ties = sum(len(s) > 1 and s[-1][1] == s[-2][1] for s in expected.values())
        assert store.time_ties == ties
    else:
        assert store.timestamps is None
        assert store.time_ties is None


@pytest.fixture
def log(write_log):
    rng = np.random.default_rng(0)
    return write_log(
        {
            "user": rng.integers(0, 40, 900),
            "item": rng.integers(5, 90, 900),
            "timestamp": range(900),
        }
    )


@pytest.fixture
def store(log, tmp_path):
    return prepare(log, store_dir=tmp_path / "stores")


def test_opening_copies_no_value_and_arrays_are_read_only(store):
    path = store.path
    before = pa.total_allocated_bytes()
    opened = SequenceStore.open(path)
    assert pa.total_allocated_bytes() == before
    names = ("offsets", "items", "timestamps", "user_ids", "item_ids")
    arrays = [getattr(opened, name) for name in names]
    arrays += [getattr(opened.histories, name) for name in ("offsets", "items", "firsts")]
    for array in arrays:
        assert not array.flags.writeable
        assert not array.flags.owndata
    assert opened.items.dtype == np.int32
    assert opened.offsets.dtype == opened.user_ids.dtype == opened.item_ids.dtype == np.int64


def test_any_arrow_reader_sees_the_original_ids(store):
    table = pa.ipc.open_file(store.path).read_all()
    start, end = store.offsets[3], store.offsets[4]
    assert table["items"][3].as_py() == store.item_ids[store.items[start:end]].tolist()


def test_prepare_finds_its_store_again(log, tmp_path):
    first = prepare(log, store_dir=tmp_path)
    written = first.path.stat().st_mtime_ns
    again = prepare(log, store_dir=tmp_path)
    assert again.path == first.path
    assert again.path.stat().st_mtime_ns == written
    assert again.fingerprint == first.fingerprint
    assert first.source == log.name
    assert len(list(tmp_path.iterdir())) == 1
    assert prepare(log, store_dir=tmp_path, order="rows").fingerprint != first.fingerprint
    assert "40 users" in repr(first)


def test_changed_log_gets_another_store(log, tmp_path):
    first = prepare(log, store_dir=tmp_path)
    table = pyarrow.parquet.read_table(log)
    pyarrow.parquet.write_table(table.slice(0, 500), log)
    second = prepare(log, store_dir=tmp_path)
    assert second.path != first.path
    assert (first.num_events, second.num_events) == (900, 500)


def test_default_folder_is_the_cache(log, tmp_path, monkeypatch):
    monkeypatch.setenv("PINET_FAST_CACHE", str(tmp_path / "cache"))
    assert prepare(log).path.parent == tmp_path / "cache" / "stores"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left")])
def test_interrupted_write_leaves_nothing(log, tmp_path, monkeypatch, error):
    def fails(*_args):
        raise error

    monkeypatch.setattr("os.fsync", fails)
    expected = StoreError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        prepare(log, store_dir=tmp_path / "stores")
    assert not (tmp_path / "stores").exists()


def test_store_folder_that_is_a_file_is_refused(log, tmp_path):
    (tmp_path / "stores").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match=r"cannot be written .*--store-dir or PINET_FAST_CACHE"):
        prepare(log, store_dir=tmp_path / "stores")


def test_log_that_changes_while_it_is_read_is_refused(log, tmp_path):
    def touch(share, text):
        if text.startswith("reading"):
            log.write_bytes(log.read_bytes() + b" ")

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(log, store_dir=tmp_path / "stores", on_progress=touch)
    assert not (tmp_path / "stores").exists()


def test_damaged_store_is_written_again(log, store):
    good = store.path.read_bytes()
    store.path.write_bytes(good[:-50])
    assert prepare(log, store_dir=store.path.parent).num_events == 900
    assert store.path.read_bytes() == good


def refused(path, match):
    with pytest.raises(StoreError, match=match) as caught:
        SequenceStore.open(path)
    assert "\n" not in str(caught.value)
    assert "prepare" in str(caught.value)


def test_missing_store_is_refused(tmp_path):
    refused(tmp_path / "none.arrow", "no such file")
    refused(tmp_path, "a folder")


@pytest.mark.parametrize("keep", [0, 7, 300, 4000, -1, -200])
def test_cut_off_store_is_refused(store, tmp_path, keep):
    path = tmp_path / "cut.arrow"
    path.write_bytes(store.path.read_bytes()[:keep])
    refused(path, "not a whole Arrow IPC file")


def test_garbage_is_refused(tmp_path):
    path = tmp_path / "garbage.arrow"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    refused(path, "not a whole Arrow IPC file")


def test_every_flipped_value_is_noticed(store, tmp_path):
    raw = bytearray(store.path.read_bytes())
    rng = np.random.default_rng(0)
    # Every buffer of values, by searching its bytes in the file.
    for array in checked_arrays(store).values():
        where = raw.index(array.tobytes())
        for place in where + rng.integers(0, array.nbytes, 8):
            changed = bytearray(raw)
            changed[place] ^= 1 << int(rng.integers(0, 8))
            path = tmp_path / "changed.arrow"
            path.write_bytes(changed)
            refused(path, "damaged: delete it")


def test_random_damage_is_refused_or_harmless(store, tmp_path):
    raw, path = store.path.read_bytes(), tmp_path / "fuzzed.arrow"
    rng = np.random.default_rng(1)
    for _ in range(600):
        changed = bytearray(raw)
        place = int(rng.integers(0, 1500))
        changed[place if rng.random() < 0.5 else -1 - place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with contextlib.suppress(StoreError):
            opened = SequenceStore.open(path)
            found, whole = checked_arrays(opened), checked_arrays(store)
            assert found.keys() == whole.keys()
            assert all(np.array_equal(found[name], whole[name]) for name in whole)


def write_ipc(path, batch, metadata, batches=1):
    with pa.ipc.new_file(path, batch.schema.with_metadata(metadata)) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    return path


def edited(store, path, batches=1, about=None, **arrays):
    """Write a store with some arrays or metadata replaced."""
    names = ("offsets", "items", "timestamps", "user_ids", "item_ids")
    parts = {name: getattr(store, name) for name in names}
    parts |= {
        f"history_{name}": getattr(store.histories, name) for name in ("offsets", "items", "firsts")
    }
    batch = batch_of(**parts | arrays)
    text = pa.ipc.open_file(store.path).schema.metadata[layout.METADATA_KEY]
    known = json.loads(text)
    for name, array in arrays.items():
        known["crc32"][name if name in known["crc32"] else f"{name}.0"] = checksum(array)
    known |= about or {}
    known = {key: value for key, value in known.items() if value != "drop"}
    return write_ipc(path, batch, {layout.METADATA_KEY: json.dumps(known)}, batches)


def test_inconsistent_stores_are_refused(store, tmp_path):
    path = tmp_path / "edited.arrow"
    swapped = store.offsets.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    too_large = store.items.copy()
    too_large[5] = 0
    refused(edited(store, path, offsets=swapped), "offsets do not increase")
    refused(
        edited(
            store,
            path,
            offsets=store.offsets[:-1],
            user_ids=store.user_ids[:-1],
            history_offsets=store.histories.offsets[:-1],
        ),
        "num_users = 40",
    )
    refused(edited(store, path, items=too_large), "expected item codes 1..")
    refused(edited(store, path, user_ids=store.user_ids[::-1].copy()), "user ids do not ascend")
    refused(edited(store, path, about={"crc32": 1}), "changed since it was written")
    refused(edited(store, path, about={"num_items": 3}), "expected num_items = 3")
    refused(edited(store, path, about={"format": 99}), "expected format 3, got 99")
    refused(edited(store, path, about={"source": "drop"}), "metadata lacks source")
    refused(edited(store, path, batches=2), "2 record batches")
    lists = store.histories
    for name, change, match in (
        ("items", np.roll(lists.items, 1), "not sorted lists|not those of its events"),
        ("items", lists.items + 100, "expected item codes 1..85 in histories"),
        ("firsts", lists.firsts + 1, "not sorted lists|not those of its events"),
        ("firsts", lists.firsts - 1, "not sorted lists"),
        ("firsts", lists.firsts + 2**30, "not sorted lists"),
    ):
        refused(edited(store, path, **{f"history_{name}": change}), match)
    swapped = lists.offsets.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    refused(edited(store, path, history_offsets=swapped), "of its histories do not increase")
    assert SequenceStore.open(edited(store, path)).num_events == store.num_events


def test_store_of_an_older_version_is_refused_and_prepared_anew(log, store, tmp_path):
    """Format 2 had no histories; a folder that holds such a store gets a new one beside it."""
    batch = pa.ipc.open_file(store.path).get_batch(0).drop_columns(["history"])
    about = {"format": 2, **dict.fromkeys(layout._KEYS, 1)}
    old = write_ipc(tmp_path / "old.arrow", batch, {layout.METADATA_KEY: json.dumps(about)})
    refused(old, r"expected format 3, got 2, of another version .* prepare the log again")
    # Even under the name of the new one it is not taken for it.
    old.replace(store.path)
    assert prepare(log, store_dir=store.path.parent).num_events == 900


def test_foreign_arrow_files_are_refused(tmp_path):
    path = tmp_path / "foreign.arrow"
    batch = pa.record_batch({"user": [1], "items": [[1]]})
    refused(write_ipc(path, batch, {}), "without the metadata of a store")
    refused(write_ipc(path, batch, {layout.METADATA_KEY: "{"}), "metadata is no JSON")
    about = dict.fromkeys(layout._KEYS, 1)
    text = json.dumps({"format": layout.FORMAT, **about})
    refused(
        write_ipc(path, batch, {layout.METADATA_KEY: text}),
        r"got columns user \(int64\), items \(list",
    )


def test_values_are_not_read_without_verify(store, tmp_path):
    path = edited(store, tmp_path / "edited.arrow", about={"crc32": 1})
    assert SequenceStore.open(path, verify=False).num_events == store.num_events


def test_damaged_strings_are_refused_or_harmless(log, tmp_path):
    table = pyarrow.parquet.read_table(log)
    words = [f"user-{user}" for user in table["user"].to_pylist()]
    store = prepare(table.set_column(0, "user", pa.array(words)), store_dir=tmp_path / "words")
    raw, path = store.path.read_bytes(), tmp_path / "fuzzed.arrow"
    rng = np.random.default_rng(2)
    for place in rng.integers(0, len(raw), 400):
        changed = bytearray(raw)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with contextlib.suppress(StoreError):
            opened = SequenceStore.open(path)
            assert opened.user_ids.tolist() == store.user_ids.tolist()
            assert np.array_equal(opened.items, store.items)
    for keep in (10, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:keep])
        refused(path, "not a whole Arrow IPC file")
