from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import Split, Strata, StratifiedBatchSampler
from pinet_fast.errors import CheckpointError, ConfigError, StrataError

SPLIT = Split.leave_one_out()
COUNTS = st.lists(st.integers(1, 30), min_size=2, max_size=7)
SIZES = st.integers(1, 40)


@pytest.fixture(scope="session")
def strata_with_counts(store_with_lengths):
    def build(counts, untrainable=0):
        # Stratum s holds users of 2 + 2s or 3 + 2s training events; one event trains nobody.
        rng = np.random.default_rng(0)
        lengths = [1] * untrainable
        for s, count in enumerate(counts):
            lengths += [4 + 2 * s + int(rng.integers(0, 2)) for _ in range(count)]
        lengths = rng.permutation(lengths)
        edges = [4 + 2 * s for s in range(len(counts) - 1)]
        return Strata.by_activeness(store_with_lengths(lengths), split=SPLIT, edges=edges)

    return build


@settings(deadline=None, max_examples=60)
@given(counts=COUNTS, batch_size=SIZES, untrainable=st.integers(0, 3))
def test_every_eligible_user_once_in_full_batches(
    strata_with_counts, counts, batch_size, untrainable
):
    strata = strata_with_counts(counts, untrainable)
    sampler = StratifiedBatchSampler(strata, batch_size=batch_size)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    drawn = np.concatenate(batches)
    assert drawn.dtype == np.int64
    assert sorted(drawn.tolist()) == np.flatnonzero(strata.activeness >= 2).tolist()
    assert sampler.num_users == sum(counts) == len(drawn)
    assert all(len(users) == batch_size for users in batches[:-1])
    for users in batches:
        assert (np.diff(strata.ids[users]) >= 0).all()


@settings(deadline=None, max_examples=100)
@given(counts=COUNTS, batch_size=SIZES)
def test_quotas_are_the_floor_or_ceiling_of_the_share(strata_with_counts, counts, batch_size):
    strata = strata_with_counts(counts)
    for users in StratifiedBatchSampler(strata, batch_size=batch_size):
        quotas = np.bincount(strata.ids[users], minlength=len(counts))
        ideal = len(users) * np.array(counts) / sum(counts)
        assert (np.abs(quotas - ideal) < 1 - 1e-9).all()


def test_a_small_stratum_is_spread_over_the_epoch(strata_with_counts):
    strata = strata_with_counts([180, 20])
    sampler = StratifiedBatchSampler(strata, batch_size=4)  # 50 batches, 20 with a head user
    has_head = [int(strata.ids[users].max()) for users in sampler]
    assert sum(has_head) == 20
    running = np.cumsum(has_head) - 0.4 * np.arange(1, 51)
    assert np.abs(running).max() < 2


@settings(deadline=None, max_examples=40)
@given(counts=COUNTS, batch_size=SIZES, data=st.data())
def test_resume_after_any_step_continues_the_same(strata_with_counts, counts, batch_size, data):
    strata = strata_with_counts(counts)

    def sampler(seed=3):
        return StratifiedBatchSampler(strata, batch_size=batch_size, seed=seed)

    whole = sampler()
    stream = [users.tolist() for _ in range(3) for users in whole]
    stop = data.draw(st.integers(0, 2 * len(whole)))
    first = sampler()
    seen = []
    while len(seen) < stop:
        for users in first:
            seen.append(users.tolist())
            if len(seen) == stop:
                break
    resumed = sampler(seed=99)
    resumed.load_state_dict(first.state_dict())
    while len(seen) < len(stream):
        seen += [users.tolist() for users in resumed]
    assert seen == stream


def test_random_access_equals_the_stream(strata_with_counts):
    sampler = StratifiedBatchSampler(strata_with_counts([20, 9]), batch_size=4, seed=1)
    for epoch in range(2):
        for step, users in enumerate(list(sampler)):
            assert sampler.batch(epoch, step).tolist() == users.tolist()
    for epoch, step in ((0, len(sampler)), (0, -1), (-1, 0)):
        with pytest.raises(IndexError):
            sampler.batch(epoch, step)


def test_seed_and_epoch_change_the_order(strata_with_counts):
    strata = strata_with_counts([40, 20])
    sampler = StratifiedBatchSampler(strata, batch_size=60, seed=0)
    first, second = (next(iter(list(sampler))).tolist() for _ in range(2))
    other = next(iter(StratifiedBatchSampler(strata, batch_size=60, seed=1))).tolist()
    assert first != second
    assert first != other
    again = StratifiedBatchSampler(strata, batch_size=60, seed=0)
    again.set_epoch(1)
    assert next(iter(again)).tolist() == second


def test_set_epoch_keeps_the_position_of_the_current_epoch(strata_with_counts):
    sampler = StratifiedBatchSampler(strata_with_counts([9, 9]), batch_size=4)
    next(iter(sampler))
    sampler.set_epoch(0)
    assert (sampler.epoch, sampler.step) == (0, 1)
    sampler.set_epoch(2)
    assert (sampler.epoch, sampler.step) == (2, 0)
    with pytest.raises(ConfigError, match="epoch: expected"):
        sampler.set_epoch(-1)


def test_state_after_the_last_batch_is_the_next_epoch(strata_with_counts):
    sampler = StratifiedBatchSampler(strata_with_counts([3, 3]), batch_size=3)
    for _ in sampler:
        state = sampler.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0)
    assert sampler.state_dict() == state
    assert set(state) == {"version", "seed", "epoch", "step", "fingerprint"}


def test_drop_last_leaves_other_users_out_every_epoch(strata_with_counts):
    strata = strata_with_counts([13, 8])
    sampler = StratifiedBatchSampler(strata, batch_size=5, drop_last=True)
    assert len(sampler) == 4
    left = []
    for _ in range(4):
        drawn = np.concatenate(list(sampler))
        assert len(set(drawn.tolist())) == len(drawn) == 20
        left.append((set(range(21)) - set(drawn.tolist())).pop())
    assert len(set(left)) > 1
    with pytest.raises(ConfigError, match="drop_last leaves no batch"):
        StratifiedBatchSampler(strata, batch_size=50, drop_last=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mix": "half"}, "mix: expected .proportional., .uniform. or .sqrt."),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"seed": -1}, "seed: expected an integer >= 0"),
        ({"min_activeness": 0}, "min_activeness"),
    ],
)
def test_bad_options_are_refused(strata_with_counts, options, match):
    with pytest.raises(ConfigError, match=match):
        StratifiedBatchSampler(strata_with_counts([3, 3]), **{"batch_size": 2, **options})


def test_stratum_that_is_never_drawn_is_refused(store_with_lengths):
    strata = Strata.by_activeness(store_with_lengths([1, 1, 6, 6]), split=SPLIT, edges=[2])
    with pytest.raises(StrataError, match=r"no user of stratum 0 \(1 event\) has 2 training"):
        StratifiedBatchSampler(strata, batch_size=2)


def test_states_of_other_runs_are_refused(strata_with_counts):
    strata = strata_with_counts([5, 5])
    sampler = StratifiedBatchSampler(strata, batch_size=2)
    state = sampler.state_dict()
    others = [
        StratifiedBatchSampler(strata, batch_size=3),
        StratifiedBatchSampler(strata, batch_size=2, drop_last=True),
        StratifiedBatchSampler(strata_with_counts([5, 6]), batch_size=2),
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="belongs to another"):
            other.load_state_dict(state)
    for change in ({"version": 1}, {"step": 5}, {"step": -1}, {"epoch": None}, {"seed": "a"}):
        with pytest.raises(CheckpointError, match="sampler state: expected"):
            sampler.load_state_dict(state | change)
    with pytest.raises(CheckpointError, match="sampler state"):
        sampler.load_state_dict({})
