from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stratum_gram_cases import LAYOUTS, assert_close, make_grad

from pinet_fast.kernels import stratum_gram

DTYPES = (torch.float32, torch.float64)
SIZES = st.one_of(
    st.just([]),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.sampled_from([[1], [15], [16], [17], [2047], [2049], [33, 65], [16384], [16385]]),
)
fixture_is_constant = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def gradients(draw):
    strata = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return [
        make_grad(
            (strata, *draw(SIZES)),
            draw(st.sampled_from(LAYOUTS)),
            draw(st.sampled_from(DTYPES)),
            generator,
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@fixture_is_constant
@given(grads=gradients())
def test_agrees_with_the_oracle(backend, grads):
    assert_close(stratum_gram(grads, backend=backend.name), grads)


@fixture_is_constant
@given(grads=gradients())
def test_writes_every_element_of_a_poisoned_output(backend, grads):
    strata = grads[0].shape[0]
    guarded = torch.full((len(grads) + 2, strata, strata), torch.nan, dtype=torch.float64)
    backend.impl(grads, guarded[1:-1])
    assert_close(guarded[1:-1], grads)
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("strata", [2, 4, 5, 8, 9])
@pytest.mark.parametrize("columns", [3, 20000])
def test_a_bad_number_stays_in_its_row_and_column(backend, bad, strata, columns):
    grad = normal(strata, columns)
    clean = stratum_gram([grad], backend=backend.name)[0]
    for s in range(strata):
        spoilt = grad.clone()
        spoilt[s, columns // 2] = bad
        out = stratum_gram([spoilt], backend=backend.name)[0]
        touched = torch.zeros(strata, strata, dtype=torch.bool)
        touched[s] = touched[:, s] = True
        assert not out[touched].isfinite().any()
        assert torch.equal(out[~touched], clean[~touched])


@pytest.mark.parametrize("strata", [1, 4, 8, 9])
def test_bits_do_not_depend_on_threads(backend, strata):
    grads = [normal(strata, 300_001), normal(strata, 7, 11), normal(strata, 40_000)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1, 2):
            torch.set_num_threads(count)
            results.append(stratum_gram(grads, backend=backend.name))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("strata", [3, 4, 8, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_permuted_strata_permute_the_gram(backend, strata, dtype):
    grad = normal(strata, 30_011, dtype=dtype)
    order = torch.randperm(strata, generator=torch.Generator().manual_seed(3))
    out = stratum_gram([grad], backend=backend.name)[0]
    permuted = stratum_gram([grad[order]], backend=backend.name)[0]
    if backend.name == "cpp":
        assert torch.equal(permuted, out[order][:, order])
    else:  # the order of summation in a matrix product may depend on the place in it
        eps = torch.finfo(dtype).eps
        size = out.diagonal().sqrt()
        error = (permuted - out[order][:, order]).abs() / (size[order, None] * size[order])
        assert float(error.max()) <= 4 * eps


def test_quadratic_form_is_the_squared_norm_of_the_combination(backend):
    grads = [normal(5, 400, 3), normal(5, 17, seed=1)]
    w = normal(5, seed=2, dtype=torch.float64)
    gram = stratum_gram(grads, backend=backend.name).sum(0)
    combined = [torch.tensordot(w, grad.double(), 1) for grad in grads]
    assert (w @ gram @ w).item() == pytest.approx(
        sum(c.square().sum().item() for c in combined), rel=1e-6
    )


def test_layout_does_not_change_the_bits(backend):
    grad = normal(4, 30, 40)
    expected = stratum_gram([grad], backend=backend.name)
    permuted = grad.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not permuted.is_contiguous()
    assert torch.equal(stratum_gram([permuted], backend=backend.name), expected)
    one = grad[:1].expand(4, 30, 40)
    assert torch.equal(
        stratum_gram([one], backend=backend.name),
        stratum_gram([one.contiguous()], backend=backend.name),
    )


def test_addresses_beyond_int32(backend):
    distance = 2**31 + 5
    try:
        storage = torch.empty(distance + 7)  # pages that nobody touches cost nothing
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    far = storage.as_strided((2, 7), (distance, 1))
    far.copy_(normal(2, 7))
    assert_close(stratum_gram([far], backend=backend.name), [far])


@pytest.mark.cpp
def test_cpp_leaves_half_precision_to_the_reference():
    from pinet_fast.kernels import _registry

    grads = [normal(2, 5).bfloat16()]
    assert _registry.select("stratum_gram", (grads,)).name == "reference"
