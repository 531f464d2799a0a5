from __future__ import annotations

import numpy as np
import pytest

from pinet_fast.data import Negatives, Split
from pinet_fast.errors import ConfigError, DataError

SPLIT = Split.leave_one_out()


def draw_many(bound, user, num_events, epoch=0):
    users, firsts = np.array([user]), np.array([1])
    return bound.draw(epoch, users, firsts, np.array([0, num_events]))


@pytest.fixture(scope="session")
def small_store(store_of):
    # Nine items. The training histories are {2, 3, 7} with a repeat, {1, 9} and {5}.
    users = [0] * 6 + [1] * 4 + [2] * 3
    items = [7, 2, 3, 2, 4, 6, 1, 9, 8, 5, 5, 1, 9]
    return store_of(users, items)


def test_negatives_are_uniform_over_the_complement(small_store):
    bound = Negatives(4).bind(small_store, SPLIT)
    for user, history in enumerate([{2, 3, 7}, {1, 9}, {5}]):
        codes = {int(np.searchsorted(small_store.item_ids, v)) for v in history}
        drawn = draw_many(bound, user, 20_000)
        assert drawn.shape == (20_000, 4)
        counts = np.bincount(drawn.ravel(), minlength=small_store.num_items + 1)
        free = sorted(set(range(1, small_store.num_items + 1)) - codes)
        assert np.flatnonzero(counts).tolist() == free
        expected = drawn.size / len(free)
        chi2 = ((counts[free] - expected) ** 2 / expected).sum()
        assert chi2 < 30, "p < 1e-4 at up to 7 degrees of freedom"


def test_held_out_items_may_be_drawn_but_training_items_never(small_store):
    drawn = set(draw_many(Negatives(1).bind(small_store, SPLIT), 0, 5000).ravel().tolist())
    train = small_store.items[: SPLIT.train_ends(small_store)[0]]
    held_out = small_store.items[SPLIT.train_ends(small_store)[0] : small_store.offsets[1]]
    assert drawn.isdisjoint(train.tolist())
    assert drawn.issuperset(held_out.tolist())


def test_exclude_none_draws_every_item_but_padding(small_store):
    drawn = draw_many(Negatives(1, exclude="none").bind(small_store, SPLIT), 0, 5000)
    assert set(drawn.ravel().tolist()) == set(range(1, small_store.num_items + 1))


def test_draws_do_not_depend_on_the_batch(small_store):
    bound = Negatives(2).bind(small_store, SPLIT, seed=5)
    together = bound.draw(3, np.array([2, 0]), np.array([1, 4]), np.array([0, 2, 7]))
    alone = bound.draw(3, np.array([0]), np.array([6]), np.array([0, 2]))
    assert (together[4:6] == alone).all()
    more = Negatives(3).bind(small_store, SPLIT, seed=5)
    wider = more.draw(3, np.array([0]), np.array([6]), np.array([0, 2]))
    assert (wider[:, :2] == alone).all()


def test_seed_epoch_user_and_position_change_the_draws(store_of):
    store = store_of([0] * 300 + [1] * 300, np.arange(600))
    streams = [
        draw_many(Negatives(1).bind(store, SPLIT, seed=seed), user, 50, epoch).ravel().tolist()
        for seed, user, epoch in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    streams.append([*streams[0][1:], 0])
    for i, one in enumerate(streams):
        for other in streams[i + 1 :]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 6


def test_user_who_has_every_item_is_refused(store_of):
    # User 8 trains on both items of the catalogue; the held-out ones are repeats.
    store = store_of([8, 8, 8, 8, 9], [1, 2, 1, 2, 1])
    with pytest.raises(DataError, match=r"user 8 has all 2 items of the catalogue.*drop the user"):
        Negatives(1).bind(store, SPLIT)
    assert draw_many(Negatives(1, exclude="none").bind(store, SPLIT), 0, 3).min() >= 1


@pytest.mark.parametrize("options", [{"n": 0}, {"n": 1.5}, {"n": True}, {"exclude": "future"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="negatives: expected"):
        Negatives(**options)


@pytest.mark.parametrize("dist", ["uniform", "popularity"])
def test_long_histories_are_searched_or_tabled_alike(store_of, dist):
    """A table is made where a user draws much; a single draw searches. Both give the same items."""
    rng = np.random.default_rng(5)
    # Histories of every kind of gaps: dense at the begin, dense at the end, even, and random.
    kinds = [np.arange(400), 2000 - np.arange(400), np.arange(400) * 5, rng.permutation(2000)[:400]]
    items = np.concatenate([[3000, *kind, 3001, 3002] for kind in kinds])
    everyone = np.arange(4).repeat(403)
    store = store_of(
        np.concatenate([everyone, np.full(3100, 9)]), np.concatenate([items, np.arange(3100)])
    )
    bound = Negatives(2, dist=dist, alpha=0.5).bind(store, SPLIT)
    for user in range(4):
        together = draw_many(bound, user, 300)
        one = np.array([user])
        alone = [
            bound.draw(0, one, np.array([position]), np.array([0, 1])) for position in range(1, 301)
        ]
        assert (together == np.concatenate(alone)).all()
        train = store.items[store.offsets[user] : SPLIT.train_ends(store)[user]]
        assert not set(together.ravel().tolist()) & set(train.tolist())
