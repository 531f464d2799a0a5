"""The public logs, where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pinet_fast.data import Negatives, RaggedLoader, Split, Strata, StratifiedBatchSampler, prepare
from pinet_fast.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("PINET_FAST_DATA") or ROOT.parent / "shared" / "data")
SIZES = {
    "ml-1m": (6040, 3416, 999_611),
    "ml-100k": (943, 1682, 100_000),
    "amazon-beauty-sasrec": (52_204, 57_289, 394_908),
    "amazon-beauty-bert4rec": (40_226, 54_542, 353_962),
    "amazon-beauty-5core": (22_363, 12_101, 198_502),
    "amazon-sports-5core": (35_598, 18_357, 296_337),
    "amazon-home-5core": (66_519, 28_237, 551_682),
    "amazon-music-melt": (20_165, 20_356, 132_595),
    "yelp-5core": (30_431, 20_033, 316_354),
}
TIE_SHARES = {"ml-100k": 0.44, "amazon-beauty-5core": 0.43, "amazon-sports-5core": 0.45,
              "amazon-music-melt": 0.28, "yelp-5core": 0.0}  # fmt: skip


def path_of(name):
    path = FOLDER / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not there; PINET_FAST_DATA names the folder of the public logs")
    return path


@pytest.mark.real_data
@pytest.mark.parametrize("name", SIZES)
def test_public_log_loads_with_its_published_size(name, tmp_path):
    order = "rows" if name == "ml-1m" else "auto"
    store = prepare(path_of(name), store_dir=tmp_path, order=order)
    assert (store.num_users, store.num_items, store.num_events) == SIZES[name]
    assert not store.simulated
    if name in TIE_SHARES:
        assert store.time_ties / store.num_users == pytest.approx(TIE_SHARES[name], abs=0.006)
    split = Split.leave_one_out()
    split.assert_no_leak(store)
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")
    assert 0.1 * store.num_users < strata.user_counts[1] <= 0.2 * store.num_users + 1
    sampler = StratifiedBatchSampler(strata, batch_size=1024)
    loader = RaggedLoader(
        store, sampler, split=split, strata=strata, max_len=50, negatives=Negatives(1)
    )
    batch = next(iter(loader))
    assert batch.num_users == min(1024, sampler.num_users)
    assert int(batch.values.min()) >= 1


@pytest.mark.real_data
def test_times_agree_with_the_order_of_rows(tmp_path):
    """Sorting by time, ties in the order of rows, gives the published sequences back."""
    path = path_of("amazon-beauty-5core")
    by_time, by_row = (prepare(path, store_dir=tmp_path, order=o) for o in ("timestamp", "rows"))
    assert (by_time.items == by_row.items).all()


@pytest.mark.real_data
def test_ml_1m_without_all_its_times_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"512,402 nulls.*--order rows"):
        prepare(path_of("ml-1m"), store_dir=tmp_path)
