"""Every kind of log gives the same store."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from pinet_fast.data import SequenceStore, prepare, read_log
from pinet_fast.data.store import checked_arrays
from pinet_fast.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
NUMBERS = pa.table(
    {
        "user": RNG.integers(0, 40, 900),
        "item": RNG.integers(5, 90, 900),
        "timestamp": RNG.integers(0, 50, 900),
    }
)
WORDS = NUMBERS.set_column(
    0, "user", pa.array([f"ü{u}" for u in NUMBERS["user"].to_pylist()])
).set_column(1, "item", pa.array([f"{i}-Ж" for i in NUMBERS["item"].to_pylist()]))


def as_json(table, path):
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
    path.write_text("".join(lines), encoding="utf-8")


def as_stream(table, path):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def as_folder(table, path):
    (path / "day=1").mkdir(parents=True)
    pyarrow.parquet.write_table(table.slice(0, 300), path / "day=1" / "a.parquet")
    pyarrow.parquet.write_table(table.slice(300), path / "day=1" / "b.parquet")
    (path / "_SUCCESS.parquet").write_text("")


WRITERS = {
    "log.parquet": pyarrow.parquet.write_table,
    "log.csv": pyarrow.csv.write_csv,
    "log.jsonl": as_json,
    "log.ndjson": as_json,
    "log.arrow": as_stream,
    "log.feather": pyarrow.feather.write_feather,
    "folder": as_folder,
}


def assert_same(one, other):
    arrays, others = checked_arrays(one), checked_arrays(other)
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert np.array_equal(array, others[name]), name


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("table", [NUMBERS, WORDS], ids=["numbers", "words"])
def test_every_kind_of_file_gives_the_same_store(table, name, tmp_path):
    path = tmp_path / name
    WRITERS[name](table, path)
    store = prepare(path, store_dir=tmp_path / "stores")
    assert_same(store, prepare(table, store_dir=tmp_path / "tables"))
    assert prepare(path, store_dir=tmp_path / "stores").path == store.path
    assert SequenceStore.open(store.path).source == name
    assert [p.name for p in (tmp_path / "stores").iterdir()] == [store.path.name]


class Frame:
    """What pandas, Polars and DuckDB have in common."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


def test_tables_of_any_maker_and_cut_give_the_same_store(tmp_path):
    import duckdb

    words = WORDS
    forms = [
        words,
        words.to_reader(max_chunksize=7),
        Frame(words),
        words.combine_chunks().to_batches()[0],
        pa.concat_tables([words.slice(0, 1), words.slice(1, 400), words.slice(401)]),
        duckdb.connect().from_arrow(words),
        words.set_column(1, "item", words["item"].dictionary_encode()),
        words.set_column(1, "item", words["item"].cast(pa.large_string())),
        words.set_column(1, "item", words["item"].cast(pa.string_view())),
    ]
    stores = [prepare(form, store_dir=tmp_path) for form in forms]
    assert {store.path for store in stores} == {stores[0].path}
    assert stores[0].source == "table"
    changed = words.set_column(2, "timestamp", pa.array(np.arange(900)))
    assert prepare(changed, store_dir=tmp_path).path != stores[0].path
    with pytest.raises(DataError, match=r"expected a path or a table .*got list"):
        prepare([1, 2], store_dir=tmp_path)


@pytest.mark.parametrize("maker", ["pandas", "polars"])
def test_frames_give_the_same_store(tmp_path, maker):
    frames = pytest.importorskip(maker)
    for table in (NUMBERS, WORDS):
        frame = frames.DataFrame(table.to_pydict())
        store = prepare(frame, store_dir=tmp_path / "frames")
        assert_same(store, prepare(table, store_dir=tmp_path / "tables"))
    lists = {"user": ["b", "a"], "items": [[5, 6, 5], [7]]}
    store = SequenceStore.from_arrow(frames.DataFrame(lists), store_dir=tmp_path)
    assert store.user_ids.tolist() == ["a", "b"]
    assert store.item_ids[store.items].tolist() == [7, 5, 6, 5]


def plain_core(events, min_user, min_item):
    """Drop one kind after the other until nothing changes."""
    while True:
        users = [u for u, _ in events]
        kept = [e for e in events if users.count(e[0]) >= min_user]
        items = [i for _, i in kept]
        kept = [e for e in kept if items.count(e[1]) >= min_item]
        if len(kept) == len(events):
            return kept
        events = kept


@pytest.mark.parametrize(("min_user", "min_item"), [(1, 1), (4, 1), (1, 6), (3, 4), (5, 5)])
def test_rare_users_and_items_are_dropped_to_the_fixed_point(tmp_path, min_user, min_item):
    rng = np.random.default_rng(3)
    events = list(zip(rng.zipf(1.5, 400) % 90, rng.zipf(1.4, 400) % 70, strict=True))
    log = pa.table({"user": [int(u) for u, _ in events], "item": [int(i) for _, i in events]})
    options = {"min_user_events": min_user, "min_item_events": min_item}
    store = prepare(log, store_dir=tmp_path, **options)
    kept = plain_core([(int(u), int(i)) for u, i in events], min_user, min_item)
    assert store.num_events == len(kept) > 0
    assert store.rows_dropped == len(events) - len(kept)
    assert (store.min_user_events, store.min_item_events) == (min_user, min_item)
    assert store.user_ids.tolist() == sorted({u for u, _ in kept})
    assert store.item_ids.tolist() == [-1, *sorted({i for _, i in kept})]
    wanted = [i for _, i in sorted(kept, key=lambda event: event[0])]
    assert store.item_ids[store.items].tolist() == wanted


def test_filters_are_checked_and_part_of_the_fingerprint(tmp_path):
    all_of_it = prepare(NUMBERS, store_dir=tmp_path)
    assert prepare(NUMBERS, store_dir=tmp_path, min_user_events=2).path != all_of_it.path
    with pytest.raises(DataError, match=r"no event is left of 900 .*choose smaller ones"):
        prepare(NUMBERS, store_dir=tmp_path, min_item_events=500)
    with pytest.raises(ConfigError, match="min_user_events: expected an integer >= 1, got 0"):
        prepare(NUMBERS, store_dir=tmp_path, min_user_events=0)
    with pytest.raises(ConfigError, match="--memory-limit 3 apples: expected a size"):
        prepare(NUMBERS, store_dir=tmp_path, memory_limit="3 apples")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("chunks", [1, 3])
def test_grouped_sequences_are_taken(tmp_path, kind, chunks):
    rows = [("b", [5, 6]), ("a", []), ("c", [9, 5, 5]), ("b", [7]), ("d", [1])]
    column = pa.array([items for _, items in rows], kind(pa.int64()))
    table = pa.table({"user": [user for user, _ in rows], "items": column})
    parts = [table.slice(i * 2, 2) for i in range(chunks)] if chunks > 1 else [table.slice(2)]
    store = SequenceStore.from_arrow(pa.concat_tables(parts), store_dir=tmp_path)
    expected = {}
    for user, items in rows if chunks > 1 else rows[2:]:
        expected.setdefault(user, []).extend(items)
    expected = {user: items for user, items in sorted(expected.items()) if items}
    assert store.user_ids.tolist() == list(expected)
    for row, items in enumerate(expected.values()):
        codes = store.items[store.offsets[row] : store.offsets[row + 1]]
        assert store.item_ids[codes].tolist() == items


def test_grouped_sequences_that_cannot_be_used_are_refused(tmp_path):
    lists = pa.array([[1, 2], None, [3]])
    table = pa.table({"user": [1, 2, 3], "items": lists, "times": [[1, 2], [3], [4]]})
    with pytest.raises(DataError, match=r"expected a list in every row, got 1 null rows"):
        SequenceStore.from_arrow(table, store_dir=tmp_path)
    whole = table.set_column(1, "items", pa.array([[1, 2], [3], [4, 5]]))
    with pytest.raises(DataError, match="as long as the list of items"):
        SequenceStore.from_arrow(whole, timestamps="times", store_dir=tmp_path)
    holed = table.set_column(1, "items", pa.array([[1, None], [3], [4]]))
    with pytest.raises(DataError, match=r"item column .*null"):
        SequenceStore.from_arrow(holed, store_dir=tmp_path)
    timed = table.set_column(1, "items", pa.array([[1, 2], [3], [4]])).set_column(
        2, "times", pa.array([[9, 2], [3], [4]])
    )
    store = SequenceStore.from_arrow(timed, timestamps="times", store_dir=tmp_path)
    assert store.item_ids[store.items].tolist() == [2, 1, 3, 4]


def test_text_columns_change_type_late_in_the_file(tmp_path):
    rows = 300_000
    path = tmp_path / "log.csv"
    lines = (f"{n % 5},{n},{n}.0\n" for n in range(rows))
    path.write_text("user,item,timestamp\n" + "".join(lines) + "x,1,0.5\n", encoding="utf-8")
    store = prepare(path, store_dir=tmp_path)
    assert store.user_ids.tolist() == ["0", "1", "2", "3", "4", "x"]
    assert store.item_ids.tolist()[:3] == [-1, 0, 1]
    assert store.num_events == rows + 1
    assert store.timestamps.dtype == np.float64


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('{"user": 1, "item": 2}\n{"user": 1\n', "malformed JSON"),
        ('{"user": 1, "item": 2}\n[1]\n', "expected an object a line"),
        ('{"user": 1, "item": 2}\n{"user": 1}\n', "1 nulls, the first in row 2"),
        ('{"user": 1, "item": 2}\n{"user": "a", "item": 2}\n', "malformed JSON"),
        ('{"user": 1, "item": 2.5}\n', "malformed JSON"),
        ("", "found no column"),
    ],
)
def test_bad_json_is_refused_in_one_line(tmp_path, text, fragment):
    path = tmp_path / "log.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=fragment) as caught:
        prepare(path, store_dir=tmp_path / "stores")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "stores").exists()


def test_json_dates_and_floats_are_times(tmp_path):
    path = tmp_path / "log.jsonl"
    for times in (["2020-01-02T00:00:00", "2020-01-01T00:00:00"], [2.5, 1.0]):
        as_json(pa.table({"user": [1, 1], "item": [1, 2], "timestamp": times}), path)
        assert prepare(path, store_dir=tmp_path).items.tolist() == [2, 1]
        assert read_log(path).timestamps[0] > read_log(path).timestamps[1]


def test_unquoted_na_is_no_value_and_quoted_na_is(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('user,item\na,1\n"NA",2\n', encoding="utf-8")
    assert prepare(path, store_dir=tmp_path).user_ids.tolist() == ["NA", "a"]
    path.write_text("user,item\na,1\nNA,2\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 nulls, the first in row 2"):
        prepare(path, store_dir=tmp_path)


def test_files_of_a_folder_must_agree(tmp_path):
    folder = tmp_path / "log"
    as_folder(NUMBERS, folder)
    pyarrow.parquet.write_table(WORDS, folder / "z.parquet")
    with pytest.raises(DataError, match=r"z.parquet: expected column 'user' of type int64"):
        prepare(folder, store_dir=tmp_path / "stores")


def test_folder_without_a_name_has_that_of_its_path(tmp_path, monkeypatch):
    (tmp_path / "events").mkdir()
    pyarrow.parquet.write_table(NUMBERS, tmp_path / "events" / "a.parquet")
    monkeypatch.chdir(tmp_path / "events")
    store = prepare(".", store_dir=tmp_path / "stores")
    assert store.source == "events"
    assert store.path.name.startswith("events-")
