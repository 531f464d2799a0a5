"""The ways to the shortest point of a simplex, and which Gram goes which."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stratum_solve_cases import KINDS, assert_solves_alike, make_gram

from pinet_fast.kernels.stratum_solve import _simplex


def of_order_one(gram):
    size = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)
    return gram / size[..., None, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strata", [1, 3, 8])
def test_host_and_device_agree(kind, strata):
    gram = of_order_one(make_gram(kind, strata, 0, (4,)))
    gram[1] = torch.nan
    gram[2, 0, 0] = torch.inf
    found, expected = _simplex.on_host(gram), _simplex.on_device(gram)
    for case in (0, 3):
        assert_solves_alike("mgda", gram[case], found[case], expected[case])
    assert found[1].isnan().all()
    assert expected[1].isnan().all()
    for case in (0, 3):  # alone, by its support where that is clear
        assert_solves_alike("mgda", gram[case], _simplex.on_host(gram[case]), expected[case])
    assert _simplex.on_host(gram[1]).isnan().all()
    alone = _simplex.on_host(gram[:1])
    assert alone.shape == (1, strata)
    assert torch.equal(alone[0], _simplex.on_host(gram[0]))


@settings(deadline=None, max_examples=200)
@given(
    kind=st.sampled_from(KINDS),
    strata=st.integers(1, 12),
    seed=st.integers(0, 999),
    shared=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_what_the_support_gives_is_the_minimum(kind, strata, seed, shared):
    gram = make_gram(kind, strata, seed)
    gram = of_order_one(gram + shared * gram.diagonal().mean())  # a direction that all have
    found = _simplex._by_support(gram.numpy())
    if found is None:
        return
    found = torch.from_numpy(found)
    assert float(found.min()) >= 0
    torch.testing.assert_close(float(found.sum()), 1.0)
    value = found @ gram @ found
    # The conditions of the minimum of a convex function on a simplex: no vertex is downhill.
    assert float((gram @ found).min() - value) >= -1e-12
    assert_solves_alike("mgda", gram, found, _simplex.on_device(gram))


def test_most_grams_are_solved_by_their_support():
    clear = [
        _simplex._by_support(of_order_one(make_gram("random", 4, seed)).numpy()) is not None
        for seed in range(100)
    ]
    assert sum(clear) >= 90


UNCLEAR = {
    "equal gradients": [[1.0, 1.0], [1.0, 1.0]],
    "nearly equal gradients": [[1.0, 1.0 - 1e-7], [1.0 - 1e-7, 1.0]],
    "a stratum at the edge of the support": [[0.5, 0.5], [0.5, 1.0]],
    "zero": [[0.0, 0.0], [0.0, 0.0]],
    "not finite": [[1.0, float("nan")], [float("nan"), 1.0]],
    "infinite": [[1.0, 0.0], [0.0, float("inf")]],
    # Gradients of which the plain solve gives two a negative share, and one of these is needed.
    "a wrong guess": [[49, 30, 32, 37], [30, 34, 35, 30], [32, 35, 61, 46], [37, 30, 46, 42]],
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_unclear_is_iterated(case, monkeypatch):
    gram = of_order_one(torch.tensor(UNCLEAR[case], dtype=torch.float64))
    called = []
    for name in ("_iterate", "_iterate_one"):
        iterate = getattr(_simplex, name)
        monkeypatch.setattr(
            _simplex, name, lambda *args, by=iterate: called.append(case) or by(*args)
        )
    found = _simplex.on_host(gram)
    assert called
    if gram.isfinite().all():
        assert_solves_alike("mgda", gram, found, _simplex.on_device(gram))
