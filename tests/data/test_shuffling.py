"""How well the stream that a sampler gives is shuffled, whatever its plan of batches.

``test_order`` checks the permutations; here is what becomes of them once batches are cut: users of
a stratum by batch, from one place to others and from one epoch to the next. Limits are 5 standard
deviations of what chance gives; with fixed seeds nothing is flaky.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from pinet_fast.data import Strata, StratifiedBatchSampler

LIMIT = 5.0
COUNTS = (900, 500, 100)
PLANS = {
    "proportional": {"batch_size": 60},
    "odd": {"batch_size": 47, "drop_last": True},
    "uniform": {"batch_size": 60, "mix": "uniform", "steps_per_epoch": 45},
    "events": {"max_events": 1200, "max_len": 30},
}
SHUFFLED = ["proportional", "odd", "uniform"]


def sampler_of(seed, **options):
    """Return a sampler of users who are in no order, in strata that have one."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(len(COUNTS)), COUNTS)
    strata = Strata(
        spec="labels", edges=(), names=("tail", "middle", "head"),
        activeness=rng.integers(2, 40, len(ids)), ids=ids,
        store_fingerprint="store", fingerprint="shuffling",
    )  # fmt: skip
    return StratifiedBatchSampler(strata, seed=seed, **options)


def draws_of(sampler, stratum, epochs):
    """Return the users of a stratum in the order in which they are drawn, and their batches."""
    first, end = np.cumsum((0, *COUNTS))[stratum : stratum + 2]
    users, batches = [], []
    for epoch in range(epochs):
        for step in range(len(sampler)):
            drawn = sampler.batch(epoch, step)
            own = drawn[(drawn >= first) & (drawn < end)] - first
            users.append(own)
            batches.append(np.full(len(own), step))
    return np.concatenate(users).astype(float), np.concatenate(batches).astype(float)


def correlation(one, other):
    """Return the correlation in standard deviations of that of independent numbers."""
    return float(np.corrcoef(one, other)[0, 1]) * math.sqrt(len(one))


@pytest.mark.parametrize("name", SHUFFLED)
@pytest.mark.parametrize("stratum", [0, 1, 2])
def test_users_k_draws_apart_are_not_correlated(name, stratum):
    sampler = sampler_of(1, **PLANS[name])
    users, batches = draws_of(sampler, stratum, epochs=20)
    per_batch = max(1, len(users) // (20 * len(sampler)))
    for lag in sorted({1, 2, 3, per_batch, 2 * per_batch, 10 * per_batch}):
        # Each user once a cycle: by 1 / n less than 0, far inside the limit.
        assert abs(correlation(users[:-lag], users[lag:])) < LIMIT, lag
    assert abs(correlation(users, batches)) < LIMIT, "a user has its favourite batches"


@pytest.mark.parametrize("name", PLANS)
def test_batches_of_two_epochs_are_independent(name):
    """Neither a user's batch nor who shares it follows from the epochs before."""
    count, epochs = COUNTS[0], 120  # "uniform" draws each of these once an epoch, too
    sampler = sampler_of(2, **PLANS[name])
    batch_of = np.full((epochs, count), -1)
    for epoch in range(epochs):
        for step in range(len(sampler)):
            own = sampler.batch(epoch, step)
            batch_of[epoch, own[own < count]] = step
    assert (batch_of >= 0).all() or name == "odd"  # which leaves others out every epoch
    for later in (1, 2):
        one, other = batch_of[:-later], batch_of[later:]
        known = (one >= 0) & (other >= 0)
        assert abs(correlation(one[known].astype(float), other[known].astype(float))) < LIMIT
        if name == "events":
            continue
        # Two of one batch: do they meet again as often as any two?
        trials = met = 0
        for before, after in zip(one, other, strict=True):
            mates = np.argsort(before, kind="stable")
            mates = mates[(before[mates] >= 0) & (after[mates] >= 0)]
            pairs = before[mates][1:] == before[mates][:-1]
            trials += int(pairs.sum())
            met += int((after[mates][1:] == after[mates][:-1])[pairs].sum())
        due = trials / len(sampler)
        assert trials > 50_000
        # Without replacement, mates are by a share of one user fewer than others.
        assert abs(met - due) < LIMIT * math.sqrt(due) + due * len(sampler) / count


@pytest.mark.parametrize("name", SHUFFLED)
def test_shares_of_any_group_stay_within_a_binomial_bound(name):
    """Who is no stratum of its own has its share by chance: within it, and as spread as it."""
    sampler = sampler_of(3, **PLANS[name])
    member = np.random.default_rng(9).random(sum(COUNTS)) < 0.3
    shares = [member[sampler.strata.ids == s].mean() for s in range(len(COUNTS))]
    scores = []
    for epoch in range(40):
        for step in range(len(sampler)):
            users = sampler.batch(epoch, step)
            quotas = np.bincount(sampler.strata.ids[users], minlength=len(COUNTS))
            due = float(quotas @ shares)
            variance = float(sum(q * p * (1 - p) for q, p in zip(quotas, shares, strict=True)))
            scores.append((member[users].sum() - due) / math.sqrt(variance))
    scores = np.array(scores)
    assert np.abs(scores).max() < LIMIT
    assert abs(scores.mean()) < LIMIT / math.sqrt(len(scores))
    # Drawn without replacement: a little narrower than binomial, never wider.
    assert 0.8 < (scores**2).mean() < 1 + LIMIT * math.sqrt(2 / len(scores))
