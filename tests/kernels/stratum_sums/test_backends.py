from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stratum_sums_cases import LAYOUTS, assert_close, make_ids, make_rows, oracle

from pinet_fast.kernels import stratum_sums

fixture_is_constant = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    num_strata = draw(st.integers(1, 9))
    count = draw(st.one_of(st.integers(0, 70), st.sampled_from([300, 1100])))
    width = draw(st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 129, 257, 1027])))
    rows = make_rows(
        count,
        width,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from([torch.float32, torch.float64])),
        generator,
    )
    order = draw(st.sampled_from(["sorted", "any"]))
    return rows, make_ids(count, num_strata, order, generator), num_strata


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids_of(count, num_strata, order="any"):
    return make_ids(count, num_strata, order, torch.Generator().manual_seed(1))


@fixture_is_constant
@given(case=cases())
def test_agrees_with_the_oracle(backend, case):
    assert_close(stratum_sums(*case, backend=backend.name), *case)


@fixture_is_constant
@given(case=cases())
def test_writes_every_element_of_a_poisoned_output_and_nothing_else(backend, case):
    rows, ids, num_strata = case
    guarded = torch.full((num_strata + 2, rows.shape[1]), torch.nan, dtype=rows.dtype)
    backend.impl(rows, ids, guarded[1:-1])
    assert_close(guarded[1:-1], *case)
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()


@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 64, 100])
def test_reads_nothing_beside_the_rows(backend, width):
    wide = torch.full((83, width + 40), torch.nan)
    rows = wide[1:-1, 20:-20]
    rows.copy_(normal(81, width))
    ids = ids_of(81, 3)
    assert_close(stratum_sums(rows, ids, 3, backend=backend.name), rows, ids, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_and_kept_in_float32(dtype):
    rows, ids = normal(500, 33, dtype=dtype), ids_of(500, 4)
    assert_close(stratum_sums(rows, ids, 4), rows, ids, 4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("order", ["sorted", "any"])
@pytest.mark.parametrize("shape", [(700, 37), (60, 1100)])
def test_a_bad_number_stays_in_its_column_and_stratum(backend, bad, order, shape):
    rows, ids = normal(*shape), ids_of(shape[0], 4, order)
    clean = stratum_sums(rows, ids, 4, backend=backend.name)
    for n in (0, shape[0] // 2, shape[0] - 1):
        spoilt = rows.clone()
        spoilt[n, 5] = bad
        out = stratum_sums(spoilt, ids, 4, backend=backend.name)
        assert not out[ids[n], 5].isfinite()
        out[ids[n], 5] = clean[ids[n], 5]
        assert torch.equal(out, clean)


def test_empty_and_one_row_strata_are_exact(backend):
    rows = normal(4, 21)
    out = stratum_sums(rows, torch.tensor([3, 1, 3, 5]), 7, backend=backend.name)
    assert torch.equal(out[[0, 2, 4, 6]], torch.zeros(4, 21))
    assert torch.equal(out[[1, 5]], rows[[1, 3]])
    none = stratum_sums(rows[:0], torch.empty(0, dtype=torch.int64), 2, backend=backend.name)
    assert torch.equal(none, torch.zeros(2, 21))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["sorted", "any"])
@pytest.mark.parametrize("shape", [(9000, 65), (130, 3001)])
def test_bits_do_not_depend_on_threads(backend, dtype, order, shape):
    rows, ids = normal(*shape, dtype=dtype), ids_of(shape[0], 4, order)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1, 2):
            torch.set_num_threads(count)
            results.append(stratum_sums(rows, ids, 4, backend=backend.name))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("layout", ["transposed", "strided", "padded"])
@pytest.mark.parametrize("shape", [(900, 50), (90, 1100)])
def test_layout_does_not_change_the_bits(backend, layout, shape):
    rows = make_rows(*shape, layout, torch.float32, torch.Generator().manual_seed(2))
    ids = ids_of(shape[0], 3)
    assert not rows.is_contiguous()
    out = stratum_sums(rows, ids, 3, backend=backend.name)
    assert torch.equal(out, stratum_sums(rows.contiguous(), ids, 3, backend=backend.name))
    spread = torch.stack((ids, ids), 1)[:, 0]
    assert not spread.is_contiguous()
    assert torch.equal(out, stratum_sums(rows, spread, 3, backend=backend.name))


def test_long_sums_are_closer_than_one_sum_of_torch(backend):
    rows, ids = normal(100_000, 3) + 10, torch.zeros(100_000, dtype=torch.int64)
    expected = oracle(rows, ids, 1)
    ours = (stratum_sums(rows, ids, 1, backend=backend.name) - expected).abs().max()
    theirs = (rows.sum(0) - expected).abs().max()
    assert ours <= max(theirs.item(), 2**-24 * expected.max().item())


def test_addresses_beyond_int32(backend):
    distance = 2**31 + 5
    try:
        storage = torch.empty(distance + 7)  # pages that nobody touches cost nothing
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    far = storage.as_strided((2, 7), (distance, 1))
    far.copy_(normal(2, 7))
    out = stratum_sums(far, torch.tensor([1, 0]), 2, backend=backend.name)
    assert torch.equal(out, far.flip(0))


@pytest.mark.cpp
@pytest.mark.parametrize("bad", [-1, 3, 2**40])
@pytest.mark.parametrize(("count", "width"), [(2, 8), (40_000, 8), (50, 3000)])
def test_ids_out_of_range_are_refused(bad, count, width):
    from pinet_fast.kernels.stratum_sums import _cpp

    if reason := _cpp.BACKEND.probe():
        pytest.skip(reason)
    ids = torch.zeros(count, dtype=torch.int64)
    ids[-1] = bad
    with pytest.raises(RuntimeError, match=r"ids: expected strata in 0\.\.2, got others"):
        stratum_sums(torch.ones(count, width), ids, 3, backend="cpp")
