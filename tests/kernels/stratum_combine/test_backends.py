from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stratum_combine_cases import LAYOUTS, OUT_LAYOUTS, Case, assert_close, oracle

from pinet_fast.kernels import stratum_combine, stratum_gram

SHAPES = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    st.sampled_from([(15,), (16,), (63,), (64,), (65,), (33, 65), (16384,), (16385,)]),
)
fixture_is_constant = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def new_case(strata, seed=0):
    return Case(strata, torch.Generator().manual_seed(seed))


@st.composite
def cases(draw):
    case = new_case(draw(st.integers(1, 9)), draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(1, 4))):
        options = {
            "layout": draw(st.sampled_from(LAYOUTS)),
            "out_layout": draw(st.sampled_from(OUT_LAYOUTS)),
            "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
            "accumulate": draw(st.booleans()),
        }
        if draw(st.booleans()):
            case.add(draw(SHAPES), **options)
        else:
            num_rows = draw(st.integers(0, 40))
            some = st.integers(0, max(num_rows - 1, 0))
            rows = draw(st.lists(some, unique=True, max_size=num_rows).map(sorted))
            shape = (len(rows), *draw(st.sampled_from([(), (1,), (5,), (17,), (64,), (3, 4)])))
            case.add(shape, rows=rows, num_rows=num_rows, **options)
    return case


def run(case, weights, backend, scale=None):
    stratum_combine(
        case.grads, weights, case.outs, scale=scale, accumulate=case.accumulate, rows=case.rows,
        backend=backend,
    )  # fmt: skip


@fixture_is_constant
@given(
    case=cases(),
    per_parameter=st.booleans(),
    scale=st.sampled_from([None, 0.25, 0.0]),
)
def test_agrees_with_the_oracle(backend, case, per_parameter, scale):
    weights = case.weights(per_parameter)
    scale = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    expected = oracle(case, weights, scale)
    run(case, weights, backend, scale)
    assert_close(case, *expected)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_falls_back_to_the_reference(dtype, accumulate):
    case = new_case(4).add((7, 5), dtype=dtype, accumulate=accumulate)
    case.add((9,), dtype=torch.float32, out_dtype=dtype)
    weights = case.weights()
    expected = oracle(case, weights)
    run(case, weights, None)
    assert_close(case, *expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_stratum_without_weight_is_not_read(backend, bad):
    for rows in (None, [0, 3, 4]):
        case = new_case(3).add((3, 70), rows=rows, num_rows=6)
        weights = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
        expected = oracle(case, weights)
        case.grads[0][1] = bad
        run(case, weights, backend)
        assert_close(case, *expected)


def test_any_other_weight_lets_bad_numbers_through(backend):
    case = new_case(3).add((40,))
    case.grads[0][1, 3], case.grads[0][2, 5] = torch.inf, torch.nan
    run(case, torch.tensor([1.0, -1e-30, 1e-300], dtype=torch.float64), backend)
    out = case.outs[0]
    assert out[3] == -torch.inf
    assert out[5].isnan()
    assert out[[0, 1, 2, 4]].isfinite().all()
    case = new_case(2).add((4,))
    run(case, torch.tensor([1.0, torch.nan], dtype=torch.float64), backend)
    assert case.outs[0].isnan().all()


def test_a_weight_below_float32_still_shows_a_nan(backend):
    """1e-300 is 0 in float32, but it is a weight: what it multiplies must show."""
    case = new_case(2).add((40,))
    case.grads[0][1, 5] = torch.nan
    run(case, torch.tensor([1.0, 1e-300], dtype=torch.float64), backend)
    assert case.outs[0][5].isnan()


def test_a_weight_beyond_float32_is_infinite_there(backend):
    case = new_case(2).add((40,)).add((40,), dtype=torch.float64)
    run(case, torch.tensor([1.0, 1e300], dtype=torch.float64), backend)
    assert case.outs[0].isinf().all()
    assert case.outs[1].isfinite().all()


@pytest.mark.parametrize("scale", [None, torch.tensor(torch.nan, dtype=torch.float64)])
def test_nothing_to_add(backend, scale):
    """No stratum weighs: outputs become 0 or stay as they are, NaN included."""
    case = new_case(2).add((9,)).add((9,), accumulate=True)
    case.add((2, 3), rows=[0, 2], num_rows=4).add((2, 3), rows=[0, 2], num_rows=4, accumulate=True)
    case.outs[1][4] = torch.nan
    case.grads[0].fill_(torch.nan)
    before = [case.outs[1].clone(), case.outs[3].clone()]
    run(case, torch.zeros(2, dtype=torch.float64), backend, scale)
    assert torch.equal(case.outs[0], torch.zeros(9))
    assert torch.equal(case.outs[2], torch.zeros(4, 3))
    torch.testing.assert_close(case.outs[1], before[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(case.outs[3], before[1])


def test_untouched_rows(backend):
    for accumulate in (False, True):
        case = new_case(2).add((2, 5), rows=[1, 4], num_rows=6, accumulate=accumulate)
        before = case.outs[0].clone()
        run(case, case.weights(), backend)
        untouched = case.outs[0][[0, 2, 3, 5]]
        assert torch.equal(untouched, before[[0, 2, 3, 5]] if accumulate else torch.zeros(4, 5))


def test_no_row_was_touched(backend):
    case = new_case(2).add((0, 5), rows=[], num_rows=300)
    case.add((0, 5), rows=[], num_rows=300, accumulate=True).add((0, 5), rows=[], num_rows=0)
    before = case.outs[1].clone()
    run(case, torch.ones(2, dtype=torch.float64), backend)
    assert torch.equal(case.outs[0], torch.zeros(300, 5))
    assert torch.equal(case.outs[1], before)


def big_case():
    case = new_case(5, seed=3)
    case.add((300_001,)).add((7, 11)).add((250, 200), dtype=torch.float64, accumulate=True)
    return case.add((700, 64), rows=list(range(0, 2100, 3)), num_rows=3000)


def test_bits_do_not_depend_on_threads(backend):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1, 2):
            torch.set_num_threads(count)
            case = big_case()
            run(case, case.weights(per_parameter=True), backend)
            results.append(case.outs)
    finally:
        torch.set_num_threads(threads)
    for outs in results:
        assert all(torch.equal(a, b) for a, b in zip(outs, results[0], strict=True))


def off_by_one(x):
    """Return ``x`` without gaps at an address that is no multiple of two elements."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


@pytest.mark.parametrize("strata", [4, 9])
def test_layout_does_not_change_the_bits(strata, backend):
    weights = torch.randn(strata, dtype=torch.float64)
    grad = torch.randn(strata, 30, 41)
    expected = torch.empty(30, 41)
    stratum_combine([grad], weights, [expected], backend=backend)
    for out in (
        torch.empty(30, 41),
        torch.empty(41, 30).t(),
        torch.empty(30, 41, 2)[..., 0],
        torch.empty(60, 41)[::2],
        off_by_one(torch.empty(30, 41)),
    ):
        for x in (
            grad,
            grad.mT.contiguous().mT,
            grad.permute(2, 1, 0).contiguous().permute(2, 1, 0),
            off_by_one(grad),
        ):
            out.fill_(torch.nan)
            stratum_combine([x], weights, [out], backend=backend)
            assert torch.equal(out, expected)


def test_adding_is_combining_and_then_adding(backend):
    weights = torch.randn(3, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        grad, held = torch.randn(3, 1001, dtype=dtype), torch.randn(1001, dtype=dtype)
        sum_, added = torch.empty(1001, dtype=dtype), held.clone()
        stratum_combine([grad], weights, [sum_], backend=backend)
        stratum_combine([grad], weights, [added], accumulate=True, backend=backend)
        if backend == "cpp" or dtype is torch.float64:
            assert torch.equal(added, held + sum_)
        else:  # the reference rounds once
            torch.testing.assert_close(added, held + sum_)


def test_writes_inside_its_output_only(backend):
    guarded = torch.full((7, 40), torch.nan)
    grad, w = torch.randn(2, 3, 40), torch.tensor([1.0, 2.0], dtype=torch.float64)
    stratum_combine([grad], w, [guarded[2:5]], backend=backend)
    torch.testing.assert_close(guarded[2:5], grad[0] + 2 * grad[1])
    assert guarded[[0, 1, 5, 6]].isnan().all()
    columns = torch.full((5, 40), torch.nan)
    stratum_combine([grad[:, :, :7]], w, [columns[:3, 9:16]], backend=backend)
    assert columns[:3, 9:16].isfinite().all()
    assert int(columns.isnan().sum()) == 5 * 40 - 21


@fixture_is_constant
@given(seed=st.integers(0, 999), strata=st.integers(1, 8))
def test_identities(backend, seed, strata):
    """One stratum: itself. Unit weights: the sum. Quadratic form of the Gram: the squared norm."""
    case = new_case(strata, seed).add((30, 7)).add((11,)).add((5, 3), rows=[0, 1, 4, 7, 8],
                                                               num_rows=9)  # fmt: skip
    one = torch.zeros(strata, dtype=torch.float64)
    one[strata // 2] = 1
    run(case, one, backend)
    assert torch.equal(case.outs[0], case.grads[0][strata // 2])
    run(case, torch.ones(strata, dtype=torch.float64), backend)
    torch.testing.assert_close(case.outs[1], case.grads[1].sum(0))
    weights = case.normal(strata)
    run(case, weights, backend)
    gram = stratum_gram(case.grads).sum(0)
    norm = sum(out.double().square().sum() for out in case.outs)
    torch.testing.assert_close(weights @ gram @ weights, norm, rtol=1e-5, atol=1e-6)


def test_addresses_beyond_int32(backend):
    distance = 2**31 + 5
    try:
        storage = torch.empty(distance + 7)  # pages that nobody touches cost nothing
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    far = storage.as_strided((2, 7), (distance, 1))
    far.copy_(torch.arange(14.0).view(2, 7))
    out = torch.empty(7)
    stratum_combine([far], torch.tensor([1.0, 2.0]).double(), [out], backend=backend)
    assert torch.equal(out, far[0] + 2 * far[1])


@pytest.mark.cpp
@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [-1, 2], [0, 5]])
def test_rows_that_are_not_ascending_or_out_of_range_are_refused(rows):
    from pinet_fast.kernels.stratum_combine import _cpp

    if reason := _cpp.BACKEND.probe():
        pytest.skip(reason)
    case = new_case(2).add((2, 3), rows=rows, num_rows=5)
    with pytest.raises(RuntimeError, match=r"rows\[0\]: expected ascending, distinct rows"):
        run(case, case.weights(), "cpp")
