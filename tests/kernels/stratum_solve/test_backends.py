from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stratum_solve_cases import KINDS, assert_solves_alike, make_gram

from pinet_fast.kernels import _registry, stratum_solve
from pinet_fast.kernels.stratum_solve import RULES

CONVEX = ("agreement", "mgda")
fixture_is_constant = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
grams = given(
    kind=st.sampled_from(KINDS),
    strata=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    rule=st.sampled_from(RULES),
)


@fixture_is_constant
@grams
def test_agrees_with_the_reference(backend, kind, strata, seed, rule):
    if kind == "opposed" and rule == "agreement":
        return  # whether a sum of zero is positive is for rounding to decide: tested below
    gram = make_gram(kind, strata, seed)
    got = stratum_solve(gram, rule, backend=backend)
    assert_solves_alike(rule, gram, got, stratum_solve(gram, rule, backend="reference"))


@fixture_is_constant
@grams
def test_finite_on_every_finite_gram(backend, kind, strata, seed, rule):
    w = stratum_solve(make_gram(kind, strata, seed), rule, backend=backend)
    assert w.isfinite().all()
    if rule in CONVEX:
        assert (w >= 0).all()
        assert float(w.sum()) == pytest.approx(1)


@fixture_is_constant
@given(seed=st.integers(0, 999), strata=st.integers(2, 8), c=st.sampled_from([0.1, 0.5, 0.9]))
def test_cagrad_with_other_radii(backend, seed, strata, c):
    gram = make_gram("random", strata, seed)
    got = stratum_solve(gram, "cagrad", c=c, backend=backend)
    assert_solves_alike("cagrad", gram, got, stratum_solve(gram, "cagrad", c=c))
    mean = stratum_solve(gram, "cagrad", c=0.0, backend=backend)
    assert mean.tolist() == pytest.approx([1 / strata] * strata)


@fixture_is_constant
@given(
    seed=st.integers(0, 999),
    strata=st.integers(2, 9),
    rule=st.sampled_from(RULES),
    data=st.data(),
)
def test_absent_strata_weigh_nothing_and_are_not_read(backend, seed, strata, rule, data):
    present = data.draw(st.lists(st.booleans(), min_size=strata, max_size=strata).filter(any))
    kept = torch.tensor([s for s, here in enumerate(present) if here])
    gram, keys = make_gram("random", strata, seed, (3,)), torch.rand(strata, strata).double()
    expected = stratum_solve(
        gram[:, kept][:, :, kept], rule, keys=keys[kept][:, kept], backend=backend
    )
    absent = ~torch.tensor(present)
    gram[:, absent], gram[:, :, absent] = torch.nan, torch.inf
    got = stratum_solve(gram, rule, present=present, keys=keys, backend=backend)
    assert (got[:, absent] == 0).all()
    assert torch.equal(got[:, kept], expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_overflow_shows_in_its_own_gram_alone(backend, rule, bad):
    gram = make_gram("random", 4, 0, (3,))
    expected = stratum_solve(gram, rule, backend=backend)
    gram[1, 2, 3] = gram[1, 3, 2] = bad
    got = stratum_solve(gram, rule, backend=backend)
    assert got[1].isnan().all()
    assert torch.equal(got[0::2], expected[0::2])


@pytest.mark.parametrize("rule", RULES)
def test_permuted_strata_have_permuted_weights(backend, rule):
    for seed in range(20):
        gram = make_gram("random", 6, seed)
        order = torch.randperm(6)
        got = stratum_solve(gram[order][:, order], rule, backend=backend)
        expected = stratum_solve(gram, rule, backend=backend)[order]
        atol = 2e-5 if rule in ("mgda", "cagrad") else 1e-10
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("rule", RULES)
def test_bits_repeat_and_do_not_depend_on_neighbours_or_strides(backend, rule):
    gram = make_gram("random", 5, 1, (4,))
    expected = stratum_solve(gram, rule, backend=backend)
    for _ in range(3):
        assert torch.equal(stratum_solve(gram, rule, backend=backend), expected)
    strided = torch.empty(4, 5, 5, 2, dtype=torch.float64)[..., 1].copy_(gram)
    assert torch.equal(stratum_solve(strided, rule, backend=backend), expected)
    if backend == "cpp":  # LAPACK and torch's sums are vectorised over the batch
        alone = torch.stack([stratum_solve(one, rule, backend=backend) for one in gram])
        assert torch.equal(alone, expected)


def test_agreement_where_the_gradients_cancel(backend):
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert stratum_solve(gram, "agreement", backend=backend).tolist() == [0.5, 0.5]


def test_mgda_meets_its_optimality_conditions(backend):
    for strata in (1, 2, 3, 8, 16, 33):
        gram = make_gram("random", strata, strata)
        w = stratum_solve(gram, "mgda", backend=backend)
        inner = gram @ w
        assert inner.min() - inner @ w >= -1e-8 * gram.diagonal().max()


@pytest.mark.parametrize("strata", [2, 8, 33, 64])
def test_spectral_rules_at_many_strata(backend, strata):
    """IMTL-G's equations, and Aligned-MTL's square root, on the solution itself."""
    gram = make_gram("random", strata, 3)
    w = stratum_solve(gram, "imtlg", backend=backend)
    projections = (gram @ w) / gram.diagonal().sqrt()
    torch.testing.assert_close(projections, projections.mean().expand(strata))
    w = stratum_solve(gram, "alignedmtl", backend=backend)
    values, vectors = torch.linalg.eigh(gram)
    expected = vectors @ ((values[0] / values).sqrt() * (vectors.T @ torch.ones(strata).double()))
    torch.testing.assert_close(w, expected / strata)


def test_pcgrad_follows_the_keys(backend):
    gradients = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gram, results = gradients @ gradients.T, set()
    for seed in range(6):
        keys = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)).double()
        projected = []
        for i in range(4):
            g = gradients[i]
            for j in sorted((j for j in range(4) if j != i), key=lambda j: float(keys[i, j])):
                dot = g @ gradients[j]
                g = g - dot.clamp_max(0) / (gradients[j] @ gradients[j]) * gradients[j]
            projected.append(g)
        w = stratum_solve(gram, "pcgrad", keys=keys, backend=backend)
        torch.testing.assert_close(w @ gradients, torch.stack(projected).mean(0))
        results.add(tuple((w * 1e6).round().tolist()))
    assert len(results) > 1


def test_equal_keys_go_by_id(backend):
    gram = make_gram("opposed", 5, 0)
    by_id = torch.arange(5).double().expand(5, 5)
    expected = stratum_solve(gram, "pcgrad", keys=by_id, backend=backend)
    got = stratum_solve(gram, "pcgrad", keys=torch.zeros(5, 5).double(), backend=backend)
    assert torch.equal(got, expected)


def test_no_gram_gives_no_weights(backend):
    empty = torch.empty(0, 3, 3, dtype=torch.float64)
    assert stratum_solve(empty, "mgda", backend=backend).shape == (0, 3)


@pytest.mark.cpp
def test_writes_inside_its_output_only():
    from pinet_fast.kernels.stratum_solve import _cpp

    if reason := _cpp.BACKEND.probe():
        pytest.skip(reason)
    guarded = torch.full((4, 5), torch.nan, dtype=torch.float64)
    for rule in RULES:
        _cpp.run(make_gram("random", 5, 0, (2,)), rule, [1, 3, 4], 0.5, None, guarded[1:3])
        assert guarded[1:3].isfinite().all()
        assert (guarded[1:3, [0, 2]] == 0).all()
        assert guarded[0].isnan().all()
        assert guarded[3].isnan().all()


@pytest.mark.cpp
def test_more_than_64_strata_are_for_the_reference():
    gram = make_gram("random", 65, 0)
    assert _registry.select("stratum_solve", (gram, "balanced")).name == "reference"
    assert stratum_solve(gram, "balanced").shape == (65,)


@pytest.mark.cpp
def test_the_kernel_refuses_what_would_be_undefined():
    from pinet_fast.kernels.stratum_solve import _cpp

    if reason := _cpp.BACKEND.probe():
        pytest.skip(reason)
    gram, out = make_gram("random", 3, 0, (1,)), torch.empty(1, 3, dtype=torch.float64)
    for kept in ([], [0, 3], [1, 1], [2, 0], [-1, 0]):
        with pytest.raises(RuntimeError, match="kept must be"):
            _cpp.run(gram, "mgda", kept, 0.5, None, out)
    with pytest.raises(RuntimeError, match="gram"):
        _cpp.run(gram, "mgda", [0, 1], 0.5, None, out[:, :2])
    with pytest.raises(RuntimeError, match="keys"):
        _cpp.run(gram, "pcgrad", [0, 1], 0.5, gram[0, :2], out)
    with pytest.raises(RuntimeError, match="no rule has the number 7"):
        torch.ops.pinet_cpp.stratum_solve(gram, 7, [0], 0.5, None, out)
