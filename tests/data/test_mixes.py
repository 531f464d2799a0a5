"""Mixes, event limits and ranks of the sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data import RaggedLoader, Split, Strata, StratifiedBatchSampler
from pinet_fast.errors import CheckpointError, ConfigError

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=6)
LIMIT = 5.0


def strata_of(counts, longest=40, seed=0):
    """Make strata of given sizes without a store; activeness 2..longest has no say in them."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return Strata(
        spec="labels",
        edges=(),
        names=tuple(f"s{s}" for s in range(len(counts))),
        activeness=rng.integers(2, longest + 1, len(ids)),
        ids=ids,
        store_fingerprint="store",
        fingerprint=f"{counts}{longest}{seed}",
    )


@st.composite
def mixes(draw, strata):
    """Draw a mix for a number of strata."""
    weights = draw(st.lists(st.integers(1, 9), min_size=strata, max_size=strata))
    explicit = [weight / sum(weights) for weight in weights]
    named = ["proportional", "uniform", "sqrt"]
    return draw(st.sampled_from([*named, explicit, dict(enumerate(explicit))]))


@st.composite
def samplers(draw, least=1):
    """Draw a builder of equal samplers; keyword arguments change it."""
    counts = draw(COUNTS)
    options = {"mix": draw(mixes(len(counts))), "seed": draw(st.integers(0, 99))}
    if draw(st.booleans()):
        options["batch_size"] = draw(st.integers(least, 40))
    else:
        options |= {"max_events": draw(st.integers(150, 900)), "max_len": draw(st.integers(1, 9))}
    strata = strata_of(counts)
    return lambda **changes: StratifiedBatchSampler(strata, **(options | changes))


def own_users(sampler, s):
    return set(np.flatnonzero(sampler.strata.ids == s).tolist())


@settings(deadline=None, max_examples=80)
@given(counts=COUNTS, batch_size=st.integers(1, 40), data=st.data())
def test_quotas_are_exact_in_the_long_run(counts, batch_size, data):
    mix = data.draw(mixes(len(counts)).filter(lambda mix: mix != "proportional"))
    sampler = StratifiedBatchSampler(strata_of(counts), batch_size=batch_size, mix=mix)
    if isinstance(mix, str):
        due = np.sqrt(counts) if mix == "sqrt" else np.ones(len(counts))
    else:
        due = np.array(list(mix.values()) if isinstance(mix, dict) else mix)
    share = due / due.sum()
    off = math.ceil(math.log2(len(counts))) / 2 + 1e-9
    total = np.zeros(len(counts))
    for epoch in range(3):
        for step in range(len(sampler)):
            ids = sampler.strata.ids[sampler.batch(epoch, step)]
            assert len(ids) == batch_size
            assert (np.diff(ids) >= 0).all()
            quotas = np.bincount(ids, minlength=len(counts))
            total += quotas
            assert (np.abs(total - total.sum() * share) <= off).all()
            # A batch drawn by chance would stay within 5 standard deviations; this one does too.
            chance = LIMIT * np.sqrt(batch_size * share * (1 - share)) + 2 * off
            assert (np.abs(quotas - batch_size * share) <= chance).all()


@settings(deadline=None, max_examples=80)
@given(build=samplers())
def test_strata_cycle_through_all_their_users(build):
    sampler = build()
    stream = np.concatenate([batch for _ in range(4) for batch in sampler])
    assert stream.dtype == np.int64
    for s in range(sampler.strata.num_strata):
        drawn = stream[sampler.strata.ids[stream] == s]
        users = own_users(sampler, s)
        for first in range(0, len(drawn), len(users)):
            cycle = drawn[first : first + len(users)].tolist()
            assert len(set(cycle)) == len(cycle)
            assert set(cycle) <= users


@settings(deadline=None, max_examples=80)
@given(build=samplers())
def test_proportional_is_every_user_once_whatever_the_limit(build):
    sampler = build(mix="proportional")
    for _ in range(2):
        drawn = np.concatenate(list(sampler))
        assert np.sort(drawn).tolist() == list(range(sampler.num_users))


@settings(deadline=None, max_examples=150)
@given(build=samplers(), max_events=st.integers(150, 900), max_len=st.integers(1, 45))
def test_no_batch_has_more_events_than_allowed(build, max_events, max_len):
    try:
        sampler = build(batch_size=None, max_events=max_events, max_len=max_len)
    except ConfigError as error:
        assert "max_events" in str(error)  # noqa: PT017 - some draws are too small to fit
        return
    events = np.minimum(sampler.strata.activeness - 1, max_len)
    for epoch in range(2):
        for step in range(len(sampler)):
            users = sampler.batch(epoch, step)
            assert 1 <= len(users) <= sampler.batch_size
            assert events[users].sum() <= max_events


def test_event_limits_are_well_used():
    strata = strata_of([3000, 1500, 400], longest=80)
    events = np.minimum(strata.activeness - 1, 50)
    least = {"proportional": 0.9, "uniform": 0.85, "sqrt": 0.85}
    for mix, use in least.items():
        sampler = StratifiedBatchSampler(strata, max_events=4000, max_len=50, mix=mix)
        sums = [int(events[users].sum()) for users in sampler]
        assert max(sums) <= 4000
        assert np.mean(sums) > use * 4000
    # Every user once takes at most the batches of the mean and two longest users a stratum.
    once = StratifiedBatchSampler(strata, max_events=4000, max_len=50)
    assert len(once) <= math.ceil(events.sum() / (4000 - 2 * 3 * 50))


@settings(deadline=None, max_examples=100)
@given(build=samplers(), data=st.data())
def test_resume_after_any_step_is_bit_identical(build, data):
    whole = build()
    stream = [users.tolist() for _ in range(3) for users in whole]
    stop = data.draw(st.integers(0, 2 * len(whole)))
    first, seen = build(), []
    while len(seen) < stop:
        for users in first:
            seen.append(users.tolist())
            if len(seen) == stop:
                break
    resumed = build(seed=100)
    resumed.load_state_dict(first.state_dict())
    while len(seen) < len(stream):
        seen += [users.tolist() for users in resumed]
    assert seen == stream


@settings(deadline=None, max_examples=100)
@given(build=samplers(least=8), world_size=st.integers(1, 8))
def test_ranks_split_every_batch(build, world_size):
    whole = build()
    try:
        ranks = [build(rank=rank, world_size=world_size) for rank in range(world_size)]
    except ConfigError as error:
        assert "world_size: the smallest batch has" in str(error)  # noqa: PT017
        assert min(len(users) for users in whole) < world_size
        return
    num_strata = whole.strata.num_strata
    assert {len(sampler) for sampler in ranks} == {len(whole)}
    assert {sampler.fingerprint for sampler in ranks} == {whole.fingerprint}
    for step, users in enumerate(list(whole)):
        parts = [sampler.batch(0, step) for sampler in ranks]
        assert all(part.tolist() == users[r::world_size].tolist() for r, part in enumerate(parts))
        assert all(len(part) > 0 for part in parts)
        quotas = np.bincount(whole.strata.ids[users], minlength=num_strata)
        for part in parts:
            own = np.bincount(whole.strata.ids[part], minlength=num_strata)
            assert (np.abs(own - quotas / world_size) < 1).all()


@settings(deadline=None, max_examples=30)
@given(build=samplers(least=8), before=st.integers(1, 8), after=st.integers(1, 8))
def test_a_state_goes_on_in_another_world_size(build, before, after):
    changes = {"mix": "uniform", "steps_per_epoch": 4, "batch_size": 8}
    changes |= {"max_events": None, "max_len": None}
    stream = [users.tolist() for users in build(**changes)]
    old = build(**changes, rank=before - 1, world_size=before)
    next(iter(old))
    for rank in range(after):
        new = build(**changes, rank=rank, world_size=after)
        new.load_state_dict(old.state_dict())
        assert [users.tolist() for users in new] == [users[rank::after] for users in stream[1:]]


@pytest.mark.parametrize("options", [{"batch_size": 8}, {"max_events": 180, "max_len": 20}])
@pytest.mark.parametrize("mix", ["proportional", "uniform"])
def test_users_meet_as_often_as_theory_says(options, mix):
    counts, epochs = (30, 18), 500
    strata = strata_of(counts)
    sampler = StratifiedBatchSampler(strata, mix=mix, seed=4, **options)
    tail, head = (np.flatnonzero(strata.ids == s) for s in (0, 1))
    meetings, due_across, due_within = np.zeros((48, 48)), 0.0, 0.0
    for epoch in range(epochs):
        for step in range(len(sampler)):
            users = sampler.batch(epoch, step)
            hits = np.bincount(users, minlength=48)
            meetings += np.outer(hits, hits)
            quotas = np.bincount(strata.ids[users], minlength=2)
            due_across += quotas[0] * quotas[1] / (30 * 18)
            due_within += quotas[0] * (quotas[0] - 1) / (30 * 29)
    across = meetings[np.ix_(tail, head)]
    assert np.abs(across - due_across).max() < LIMIT * math.sqrt(due_across)
    if "batch_size" in options:  # else, users of similar length meet less often, by design
        within = meetings[np.ix_(tail, tail)][np.triu_indices(30, 1)]
        assert np.abs(within - due_within).max() < LIMIT * math.sqrt(due_within)


def test_weights_make_the_mean_of_batches_that_of_users():
    counts = [60, 30, 10]
    strata = strata_of(counts)
    values = np.random.default_rng(0).normal(size=100)
    for mix in ("uniform", "sqrt", {"s0": 0.5, "s1": 0.25, "s2": 0.25}):
        sampler = StratifiedBatchSampler(strata, batch_size=16, mix=mix, steps_per_epoch=3000)
        assert sampler.stratum_weights.dtype == np.float64
        users = np.concatenate(list(sampler))
        estimate = (values * sampler.stratum_weights[strata.ids])[users].mean()
        # Whole cycles are exact: what is left is at most one unfinished cycle a stratum.
        assert abs(estimate - values.mean()) < 5 * 100 / len(users)
    assert StratifiedBatchSampler(strata, batch_size=16).stratum_weights.tolist() == [1, 1, 1]
    uniform = StratifiedBatchSampler(strata, batch_size=16, mix="uniform").stratum_weights
    np.testing.assert_allclose(uniform, [1.8, 0.9, 0.3])


def test_epochs_of_a_mix_are_as_long_as_proportional_ones():
    strata = strata_of([20, 5])
    for drop_last, steps in ((False, 4), (True, 3)):
        options = {"batch_size": 7, "drop_last": drop_last}
        assert len(StratifiedBatchSampler(strata, mix="uniform", **options)) == steps
        assert len(StratifiedBatchSampler(strata, **options)) == steps
    sampler = StratifiedBatchSampler(strata, batch_size=7, mix="uniform", steps_per_epoch=9)
    stream = [users.tolist() for users in [*sampler, *sampler]]
    other = StratifiedBatchSampler(strata, batch_size=7, mix="uniform", steps_per_epoch=18)
    assert [users.tolist() for users in other] == stream


def test_integers_of_numpy_are_integers():
    strata = strata_of([20, 5])
    plain = {"batch_size": 7, "mix": "sqrt", "steps_per_epoch": 3, "seed": 1, "world_size": 2}
    one = StratifiedBatchSampler(strata, **plain)
    typed = {name: np.int64(v) if isinstance(v, int) else v for name, v in plain.items()}
    two = StratifiedBatchSampler(strata, **typed)
    assert one.state_dict() == two.state_dict()
    assert [users.tolist() for users in one] == [users.tolist() for users in two]
    limits = {"max_events": 200, "max_len": 9}
    one = StratifiedBatchSampler(strata, **limits)
    two = StratifiedBatchSampler(strata, **{name: np.int64(v) for name, v in limits.items()})
    assert one.fingerprint == two.fingerprint


def test_a_stratum_smaller_than_its_quota_is_repeated():
    sampler = StratifiedBatchSampler(strata_of([20, 2]), batch_size=10, mix="uniform")
    for users in sampler:
        assert np.bincount(users[5:]).max() <= 3
        assert len(set(users[:5].tolist())) == 5 or sampler.step > 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "one of batch_size and max_events, got neither"),
        ({"batch_size": 3, "max_events": 90}, "one of batch_size and max_events, got both"),
        ({"max_events": 0}, "max_events: expected an integer >= 1"),
        ({"max_events": 20}, "max_events: a user has 39 events and a batch at most 20"),
        ({"max_events": 50, "mix": "uniform"}, r"max_events: expected at least \d+"),
        ({"max_events": 90, "max_len": 0}, "max_len: expected"),
        ({"batch_size": 3, "mix": [0.5, 0.5]}, "expected 3 shares"),
        ({"batch_size": 3, "mix": "sqrt", "steps_per_epoch": 0}, "steps_per_epoch: expected"),
        ({"batch_size": 3, "steps_per_epoch": 4}, "'proportional' is every user once"),
        ({"batch_size": 3, "rank": 1}, "rank: expected less than world_size 1"),
        ({"batch_size": 3, "rank": -1, "world_size": 2}, "rank: expected an integer >= 0"),
        ({"batch_size": 3, "world_size": 0}, "world_size: expected an integer >= 1"),
        ({"batch_size": 3, "world_size": True}, "world_size: expected an integer >= 1"),
        ({"batch_size": 7, "world_size": 8}, "smallest batch has 4 users for 8 ranks"),
        ({"batch_size": 3, "mix": "sqrt", "world_size": 4}, "smallest batch has 3 users"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, match):
    with pytest.raises(ConfigError, match=match) as caught:
        StratifiedBatchSampler(strata_of([30, 20, 10]), **options)
    assert "\n" not in str(caught.value)


def test_states_of_other_mixes_are_refused():
    strata = strata_of([30, 20])
    state = StratifiedBatchSampler(strata, batch_size=5).state_dict()
    for options in (
        {"batch_size": 5, "mix": "uniform"},
        {"batch_size": 5, "mix": [0.6, 0.4]},  # the shares of proportional, but not its plan
        {"max_events": 200},
    ):
        with pytest.raises(CheckpointError, match="belongs to another"):
            StratifiedBatchSampler(strata, **options).load_state_dict(state)


@pytest.mark.parametrize("mix", ["proportional", "uniform"])
def test_ranks_of_a_loader_together_stay_within_the_limit(store_with_lengths, mix):
    rng = np.random.default_rng(5)
    store = store_with_lengths(rng.integers(1, 30, 300).tolist())
    split = Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")
    loaders = [
        RaggedLoader(
            store,
            StratifiedBatchSampler(
                strata, max_events=400, max_len=12, mix=mix, rank=rank, world_size=2
            ),
            split=split,
            strata=strata,
            max_len=12,
        )
        for rank in range(2)
    ]
    totals = [sum(len(batch.values) for batch in batches) for batches in zip(*loaders, strict=True)]
    assert max(totals) <= 400
    assert np.mean(totals) > 300


def test_ranks_are_those_of_the_process_group(monkeypatch):
    strata = strata_of([30, 20])
    alone = StratifiedBatchSampler(strata, batch_size=25)
    assert (alone.rank, alone.world_size) == (0, 1)
    found = {"is_initialized": True, "get_rank": 3, "get_world_size": 8}
    for name, value in found.items():
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    own = StratifiedBatchSampler(strata, batch_size=25)
    given = StratifiedBatchSampler(strata, batch_size=25, rank=3, world_size=8)
    assert [users.tolist() for users in own] == [users.tolist() for users in given]
    whole = StratifiedBatchSampler(strata, batch_size=25, rank=0, world_size=1)
    assert [users.tolist() for users in whole] == [users.tolist() for users in alone]
