"""``python -m benchmarks.published.repeats``: a run's metrics if repeated targets are misses.

This library masks the history but never the target. Others mask the target too where it is in the
history (S3-Rec's full ranking), so that those users can only miss; on logs with repeated pairs of
user and item, Yelp's for example, figures compare only after the same is done here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pinet_fast.data import SequenceStore, prepare
from pinet_fast.training.metrics import mean_metric


def repeated_targets(store: SequenceStore) -> dict[object, bool]:
    """Return for every user id whether the last item is among the earlier ones."""
    offsets, items = np.asarray(store.offsets), np.asarray(store.items)
    ids = np.asarray(store.user_ids).tolist()
    found = {}
    for user, start, end in zip(ids, offsets[:-1], offsets[1:], strict=True):
        found[user] = bool(end - start > 1 and (items[start : end - 1] == items[end - 1]).any())
    return found


def with_misses(
    ranks: npt.NDArray[np.int64], is_repeated: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Return the ranks with those of repeated targets beyond any cutoff."""
    return np.where(is_repeated, np.iinfo(np.int64).max, ranks)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.published.repeats", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of a leave-one-out run")
    parser.add_argument("--data", type=Path, required=True, help="its log")
    given = parser.parse_args(arguments)
    config = json.loads((given.run / "config.json").read_text(encoding="utf-8"))
    known = repeated_targets(prepare(given.data, order=config["order"]))
    with np.load(given.run / "test_ranks.npz") as file:
        ranks, users = file["backbone"], file["users"].tolist()
    is_repeated = np.array([known[user] for user in users])
    as_misses = with_misses(ranks, is_repeated)
    print(f"targets that their user had before: {is_repeated.mean():.1%} of {len(users):,} users")
    for name, found in (("as they are", ranks), ("as misses", as_misses)):
        hits = float((found <= 10).mean())
        print(f"{name}: NDCG@10 {mean_metric(found):.4f}, HR@10 {hits:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
