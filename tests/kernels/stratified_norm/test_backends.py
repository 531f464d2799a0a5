from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stratified_norm_cases import LAYOUTS, assert_close, by_autograd, make_case, oracle

from pinet_fast.kernels import stratified_norm_backward

DTYPES = (torch.float32, torch.float64)
fixture_is_constant = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
wanted = st.tuples(st.booleans(), st.booleans(), st.booleans())


@st.composite
def cases(draw):
    return make_case(
        draw(st.one_of(st.integers(0, 70), st.sampled_from([300, 1100]))),
        draw(st.one_of(st.integers(1, 40), st.sampled_from([0, 63, 64, 65, 129, 257]))),
        draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(DTYPES)),
        order=draw(st.sampled_from(["sorted", "any"])),
        layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        has_weight=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def run(case, backend, need=(True, True, True)):
    return stratified_norm_backward(
        *case.arguments(), need_rows=need[0], need_weight=need[1], need_bias=need[2],
        backend=backend.name,
    )  # fmt: skip


@fixture_is_constant
@given(case=cases(), need=wanted)
def test_agrees_with_the_oracle_and_gives_what_is_needed(backend, case, need):
    got = run(case, backend, need)
    assert_close(got, case)
    assert tuple(out is not None for out in got) == need


@fixture_is_constant
@given(case=cases(), need=wanted)
def test_writes_every_element_of_poisoned_outputs_and_nothing_else(backend, case, need):
    count, width = case.rows.shape
    guarded = [
        torch.full((height + 2, width), torch.nan, dtype=case.rows.dtype) if needed else None
        for height, needed in zip((count, case.num_strata, case.num_strata), need, strict=True)
    ]
    outs = [None if out is None else out[1:-1] for out in guarded]
    made = backend.impl(*case.arguments()[:-1], *outs)
    if made is not None:  # by torch, in memory of its own
        outs[0] = made
    assert_close(outs, case)
    for out in guarded:
        assert out is None or out[[0, -1]].isnan().all()


@pytest.mark.parametrize("width", [2, 15, 17, 33, 50, 64])
@pytest.mark.parametrize("has_weight", [False, True])
def test_agrees_with_a_backward_of_layer_norm_a_stratum(backend, width, has_weight):
    case = make_case(200, width, 4, dtype=torch.float64, has_weight=has_weight)
    for got, expected in zip(run(case, backend), by_autograd(case), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_one_stratum_is_the_ordinary_backward(backend):
    case = make_case(300, 48, 1)
    expected = torch.ops.aten.native_layer_norm_backward(
        case.grad, case.rows, [48], case.mean[:, None], case.rstd[:, None], case.weight,
        case.weight, [True, True, True],
    )  # fmt: skip
    got = run(case, backend)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 64, 100])
def test_reads_nothing_beside_the_rows(backend, width):
    case = make_case(81, width)
    for name in ("grad", "rows"):
        wide = torch.full((83, width + 40), torch.nan)
        wide[1:-1, 20:-20] = getattr(case, name)
        setattr(case, name, wide[1:-1, 20:-20])
    for name in ("mean", "rstd", "weight"):
        inside = getattr(case, name)
        wide = torch.full((len(inside) + 40,), torch.nan)
        wide[20:-20] = inside
        setattr(case, name, wide[20:-20])
    assert_close(run(case, backend), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_to_the_reference(dtype):
    case = make_case(200, 33, dtype=dtype)
    assert case.mean.dtype == torch.float32  # as of torch under autocast
    assert_close(stratified_norm_backward(*case.arguments()), case)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("order", ["sorted", "any"])
@pytest.mark.parametrize("spoil", ["grad", "rows", "mean", "rstd"])
def test_a_bad_number_stays_in_its_row_and_stratum(backend, bad, order, spoil):
    case = make_case(700, 37, 4, order=order)
    clean = run(case, backend)
    for n in (0, 350, 699):
        spoilt = make_case(700, 37, 4, order=order)
        where = (n, 5) if spoil in ("grad", "rows") else n
        getattr(spoilt, spoil)[where] = bad
        out = run(spoilt, backend)
        assert not out[0][n].isfinite().all()
        others = torch.arange(700) != n
        assert torch.equal(out[0][others], clean[0][others])
        other_strata = torch.arange(4) != case.ids[n]
        for got, before in zip(out[1:], clean[1:], strict=True):
            assert torch.equal(got[other_strata], before[other_strata])
        stratum = out[2 if spoil == "grad" else 1][case.ids[n]]
        assert not stratum.isfinite().all()
        if spoil in ("grad", "rows"):  # and in its column
            columns = torch.arange(37) != 5
            assert torch.equal(
                stratum[columns], clean[2 if spoil == "grad" else 1][case.ids[n], columns]
            )


def test_empty_and_one_row_strata_are_exact(backend):
    case = make_case(4, 21, 7)
    case.ids = torch.tensor([3, 1, 3, 5])
    _, grad_weight, grad_bias = run(case, backend)
    for out in (grad_weight, grad_bias):
        assert torch.equal(out[[0, 2, 4, 6]], torch.zeros(4, 21))
    assert torch.equal(grad_bias[[1, 5]], case.grad[[1, 3]])
    assert_close((None, grad_weight, grad_bias), case)
    none = run(make_case(0, 21, 2), backend)
    assert none[0].shape == (0, 21)
    assert torch.equal(torch.stack(none[1:]), torch.zeros(2, 2, 21))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["sorted", "any"])
def test_bits_do_not_depend_on_threads(backend, dtype, order):
    case = make_case(4000, 65, 4, dtype=dtype, order=order)
    one_row = make_case(1, 40_000, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1, 2):
            torch.set_num_threads(count)
            results.append([*run(case, backend), *run(one_row, backend)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("layout", ["transposed", "strided", "padded"])
def test_layout_does_not_change_the_bits(backend, layout):
    case = make_case(400, 50, layouts=(layout, layout))
    assert not case.grad.is_contiguous()
    strided = run(case, backend)
    case.grad, case.rows = case.grad.contiguous(), case.rows.contiguous()
    for name in ("mean", "rstd", "weight", "ids"):
        values = getattr(case, name)
        setattr(case, name, torch.stack((values, values), 1)[:, 0])
        assert not getattr(case, name).is_contiguous()
    for a, b in zip(strided, run(case, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, True), (True, False, True)])
def test_what_is_left_out_does_not_change_the_bits_of_the_rest(backend, need):
    case = make_case(300, 50)
    for a, b in zip(run(case, backend, need), run(case, backend), strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("offset", [0, 100])
def test_errors_are_no_larger_than_those_of_torch(backend, offset):
    case = make_case(6400, 64, 1)
    case.rows += offset
    _, mean, rstd = torch.native_layer_norm(case.rows, [64], None, None, 1e-5)
    case.mean, case.rstd = mean.flatten(), rstd.flatten()
    theirs = torch.ops.aten.native_layer_norm_backward(
        case.grad, case.rows, [64], mean, rstd, case.weight, case.weight, [True, True, True]
    )
    got = run(case, backend)
    for ours, other, expected in zip(got, theirs, oracle(case), strict=True):
        error = (ours.double() - expected).square().mean().sqrt()
        bound = (other.double() - expected.view(other.shape)).square().mean().sqrt()
        assert error <= 1.05 * bound


@pytest.mark.cpp
@pytest.mark.parametrize("bad", [-1, 3, 2**40])
@pytest.mark.parametrize("count", [2, 20_000])
def test_ids_out_of_range_are_refused(bad, count):
    from pinet_fast.kernels.stratified_norm import _cpp

    if reason := _cpp.BACKEND.probe():
        pytest.skip(reason)
    case = make_case(count, 8)
    case.ids[-1] = bad
    with pytest.raises(RuntimeError, match=r"ids: expected strata in 0\.\.2, got others"):
        stratified_norm_backward(*case.arguments(), backend="cpp")
