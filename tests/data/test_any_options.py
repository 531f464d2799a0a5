"""Whatever the options of a loader: threads, a resume and ranks change nothing of its batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from pinet_fast.data import (
    Crop,
    Drop,
    Negatives,
    RaggedLoader,
    Split,
    Strata,
    StratifiedBatchSampler,
)

SPLIT = Split.leave_one_out()
SAMPLERS = st.fixed_dictionaries(
    {
        "mix": st.sampled_from(["proportional", "uniform", "sqrt", [0.25, 0.75]]),
        "seed": st.integers(0, 9),
    }
)
SIZES = st.sampled_from(
    [{"batch_size": 9}, {"batch_size": 16}, {"max_events": 90, "max_len": 5}]
)  # all with room for eight ranks
LOADERS = st.fixed_dictionaries(
    {
        "crop": st.sampled_from(["tail", "random_window", "prefix"]),
        "targets": st.sampled_from(["next", "last"]),
        "augment": st.sampled_from([(), (Drop(0.3),), (Crop(0.6), Drop(0.2))]),
        "negatives": st.sampled_from(
            [
                None,
                Negatives(2),
                Negatives(1, "window", per="user", log_q=True),
                Negatives(2, dist="popularity", alpha=0.75),
            ]
        ),
        "seed": st.integers(0, 9),
    }
)


@pytest.fixture(scope="module")
def store(store_with_lengths):
    lengths = np.random.default_rng(8).integers(3, 15, 70)
    return store_with_lengths(lengths.tolist(), num_items=90)


def make(store, drawn, options, **changes):
    strata = Strata.by_activeness(store, split=SPLIT, edges=[6])
    ranks = {name: changes.pop(name) for name in ("rank", "world_size") if name in changes}
    sampler = StratifiedBatchSampler(strata, **drawn, **ranks)
    return RaggedLoader(
        store, sampler, split=SPLIT, strata=strata, max_len=5, **options, **changes
    )  # fmt: skip


def content(batch):
    return [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf
            for leaf in pytree.tree_leaves(batch)]  # fmt: skip


def by_user(batch, targets):
    """Return what every row holds, by its user; one user may have several rows."""
    offsets, rows = batch.offsets.tolist(), {}
    for b, user in enumerate(batch.users.tolist()):
        mine = slice(offsets[b], offsets[b + 1])
        own = mine if targets == "next" else slice(b, b + 1)
        parts = [batch.values[mine].tolist(), batch.targets[own].tolist()]
        if batch.negatives is not None:
            is_own = len(batch.negatives) == len(batch.targets)
            parts.append(batch.negatives[own if is_own else slice(b, b + 1)].tolist())
        if batch.weights is not None:
            parts.append(batch.weights[b].item())
        rows.setdefault(user, []).append(parts)
    return rows


@settings(deadline=None, max_examples=25)
@given(
    drawn=SAMPLERS, size=SIZES, options=LOADERS, prefetch=st.integers(1, 6),
    lifetime=st.sampled_from(["copy", "lease"]),
)  # fmt: skip
def test_stream_of_any_number_of_threads(store, drawn, size, options, prefetch, lifetime):
    plain = make(store, drawn | size, options)
    stream = [content(batch) for _ in range(2) for batch in plain]
    for threads in (1, 4):
        ahead = {"threads": threads, "prefetch": prefetch, "lifetime": lifetime}
        with make(store, drawn | size, options, **ahead) as other:
            assert [content(batch) for _ in range(2) for batch in other] == stream
            assert other.state_dict() == plain.state_dict()


@settings(deadline=None, max_examples=40)
@given(drawn=SAMPLERS, size=SIZES, options=LOADERS, data=st.data())
def test_resume_after_any_step(store, drawn, size, options, data):
    plain = make(store, drawn | size, options)
    stream = [content(batch) for _ in range(2) for batch in plain]
    stop = data.draw(st.integers(1, len(stream) - 1))
    before, after = (data.draw(st.integers(0, 3)) for _ in range(2))
    with make(store, drawn | size, options, threads=before) as first:
        seen = []
        while len(seen) < stop:
            for batch in first:
                seen.append(content(batch))
                if len(seen) == stop:
                    break
        state = first.state_dict()
    with make(store, drawn | size, options, threads=after) as resumed:
        resumed.load_state_dict(state)
        while len(seen) < len(stream):
            seen += [content(batch) for batch in resumed]
    assert seen == stream


@settings(deadline=None, max_examples=40)
@given(drawn=SAMPLERS, size=SIZES, options=LOADERS, world_size=st.integers(1, 8), data=st.data())
def test_ranks_share_every_batch(store, drawn, size, options, world_size, data):
    """Also after a resume in another world size."""
    drawn = drawn | size
    if drawn["mix"] == "proportional" and "batch_size" in drawn:
        drawn["drop_last"] = True  # the last one may have fewer users than ranks
    whole = make(store, drawn, options)
    start = data.draw(st.integers(0, len(whole) - 1))
    for _, _ in zip(range(start), whole, strict=False):
        pass
    ranks = []
    for rank in range(world_size):
        ranks.append(make(store, drawn, options, rank=rank, world_size=world_size))
        ranks[-1].load_state_dict(whole.state_dict())
    rest = [list(loader) for loader in ranks]
    expected = list(whole)
    assert {len(batches) for batches in rest} == {len(expected)}
    for step, batch in enumerate(expected):
        together = {}
        for batches in rest:
            for user, rows in by_user(batches[step], options["targets"]).items():
                together.setdefault(user, []).extend(rows)
        assert sum(len(batches[step]) for batches in rest) == len(batch)
        found = {user: sorted(rows) for user, rows in together.items()}
        due = by_user(batch, options["targets"])
        assert found == {user: sorted(rows) for user, rows in due.items()}
