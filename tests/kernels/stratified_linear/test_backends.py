from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stratified_linear_cases import LAYOUTS, assert_close, make_matrix, make_strata, oracle

from pinet_fast.kernels import stratified_linear_backward
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.stratified_linear import _cpp

fixture_is_constant = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    num_strata = draw(st.integers(1, 9))
    count = draw(st.one_of(st.integers(0, 70), st.just(1100)))
    wide, deep = (draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 65]))) for _ in "ab")
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    grad = make_matrix(count, wide, draw(st.sampled_from(LAYOUTS)), dtype, generator)
    rows = make_matrix(count, deep, draw(st.sampled_from(LAYOUTS)), dtype, generator)
    weight = make_matrix(wide, deep, draw(st.sampled_from(LAYOUTS)), dtype, generator)
    return grad, rows, weight, make_strata(count, num_strata, draw(st.booleans()), generator)


def sample(count=500, wide=24, deep=17, num_strata=4, is_sorted=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    matrices = [
        make_matrix(n, d, "contiguous", dtype, generator)
        for n, d in ((count, wide), (count, deep), (wide, deep))
    ]
    return (*matrices, make_strata(count, num_strata, is_sorted, generator))


@fixture_is_constant
@given(case=cases())
def test_agrees_with_the_oracle(backend, case):
    grad, rows, weight, (ids, offsets, order) = case
    outs = stratified_linear_backward(grad, rows, weight, ids, offsets, order, backend=backend.name)
    assert_close(outs, grad, rows, weight, ids, len(offsets) - 1)


@fixture_is_constant
@given(case=cases())
def test_writes_every_element_of_poisoned_outputs_and_nothing_else(backend, case):
    grad, rows, weight, (ids, offsets, order) = case
    num_strata, (wide, deep) = len(offsets) - 1, weight.shape
    shapes = ((rows.shape[0], deep), (num_strata, wide, deep), (num_strata, wide))
    guarded = [torch.full((n + 2, *rest), torch.nan, dtype=rows.dtype) for n, *rest in shapes]
    outs = [guard[1:-1] for guard in guarded]
    backend.impl(grad, rows, weight, ids, offsets, order, *outs)
    assert_close(outs, grad, rows, weight, ids, num_strata)
    for guard in guarded:
        assert guard[0].isnan().all()
        assert guard[-1].isnan().all()


def test_whole_batch_is_the_sum_over_strata(backend):
    grad, rows, weight, (ids, offsets, order) = sample(dtype=torch.float64)
    _, by_stratum, biases = stratified_linear_backward(
        grad, rows, weight, ids, offsets, order, backend=backend.name
    )
    torch.testing.assert_close(by_stratum.sum(0), grad.t() @ rows)
    torch.testing.assert_close(biases.sum(0), grad.sum(0))


def test_one_stratum_is_autograds_own_gradient(backend):
    grad, rows, weight, _ = sample()
    linear = torch.nn.Linear(17, 24, bias=False)
    linear.weight.data = weight
    rows.requires_grad_()
    linear(rows).backward(grad)
    zeros = torch.zeros(500, dtype=torch.int64)
    outs = stratified_linear_backward(
        grad, rows.detach(), weight, zeros, (0, 500), need_bias=False, backend=backend.name
    )
    assert torch.equal(outs[0], rows.grad)
    assert torch.equal(outs[1][0], linear.weight.grad)


@pytest.mark.parametrize("is_sorted", [True, False])
def test_a_nan_stays_with_its_stratum_and_row(backend, is_sorted):
    grad, rows, weight, (ids, offsets, order) = sample(is_sorted=is_sorted)
    grad[123, 5] = torch.nan
    out = stratified_linear_backward(grad, rows, weight, ids, offsets, order, backend=backend.name)
    others = torch.arange(4) != ids[123]
    assert out[0].isnan().any(1).nonzero().flatten().tolist() == [123]
    assert out[1][others].isfinite().all()
    assert out[1][ids[123]].isnan().any(1).nonzero().flatten().tolist() == [5]
    assert out[2][others].isfinite().all()


def test_empty_strata_are_exactly_zero_and_one_row_strata_exact(backend):
    grad, rows, weight, _ = sample(count=2)
    ids = torch.tensor([1, 3])
    out = stratified_linear_backward(grad, rows, weight, ids, (0, 0, 1, 1, 2), backend=backend.name)
    assert torch.equal(out[1][[0, 2]], torch.zeros(2, 24, 17))
    assert torch.equal(out[2][[0, 2]], torch.zeros(2, 24))
    assert torch.equal(out[1][[1, 3]], grad.unsqueeze(2) * rows.unsqueeze(1))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_what_is_needed_comes_back(backend, needs):
    grad, rows, weight, (ids, offsets, order) = sample()
    rows_needed, weight_needed, bias_needed = needs
    outs = stratified_linear_backward(
        grad, rows, weight if rows_needed else None, ids, offsets, order,
        need_rows=rows_needed, need_weight=weight_needed, need_bias=bias_needed,
        backend=backend.name,
    )  # fmt: skip
    whole = oracle(grad, rows, weight, ids, 4)
    for out, right, is_needed in zip(outs, whole, needs, strict=True):
        assert (out is not None) == is_needed
        if is_needed:
            torch.testing.assert_close(out, right.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stratum_gradients_of_half_precision_are_kept_in_float32(dtype):
    grad, rows, weight, (ids, offsets, order) = sample()
    grad, rows, weight = grad.to(dtype), rows.to(dtype), weight.to(dtype)
    outs = stratified_linear_backward(grad, rows, weight, ids, offsets, order)
    assert [out.dtype for out in outs] == [dtype, torch.float32, torch.float32]
    _, by_stratum, biases = oracle(grad, rows, weight, ids, 4)
    torch.testing.assert_close(outs[1], by_stratum.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[2], biases.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_sorted", [True, False])
def test_repeats_are_equal_to_the_bit(backend, is_sorted):
    grad, rows, weight, (ids, offsets, order) = sample(count=3000, wide=64, deep=64)
    first, *others = (
        stratified_linear_backward(grad, rows, weight, ids, offsets, order, backend=backend.name)
        for _ in range(5)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.cpp
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("count", [500, 3000])
def test_fused_kernel_has_the_same_bits_for_any_number_of_threads(count, is_sorted, monkeypatch):
    if reason := library_refusal():
        pytest.skip(reason)
    monkeypatch.setattr(_cpp, "has_tuned_blas", lambda: False)
    grad, rows, weight, (ids, offsets, order) = sample(count, 64, 65, is_sorted=is_sorted)
    outs = []
    before = torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        try:
            outs.append(
                stratified_linear_backward(grad, rows, weight, ids, offsets, order, backend="cpp")
            )
        finally:
            torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


def test_fused_kernel_serves_what_it_is_made_for(monkeypatch):
    monkeypatch.setattr(_cpp, "has_tuned_blas", lambda: False)
    assert _cpp.is_fused(torch.float32, 2, 192 * 64)
    assert not _cpp.is_fused(torch.float64, 2, 192 * 64)
    assert not _cpp.is_fused(torch.float32, 1, 192 * 64)  # torch's own bits
    assert not _cpp.is_fused(torch.float32, 2, 12_101 * 64)  # no cache holds this weight
    monkeypatch.setattr(_cpp, "has_tuned_blas", lambda: True)
    assert not _cpp.is_fused(torch.float32, 2, 192 * 64)


@pytest.mark.cpp
def test_the_vendors_products_serve_where_they_are_made_for_the_processor():
    if reason := library_refusal():
        pytest.skip(reason)
    path = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not path.is_file():
        pytest.skip("the processor's maker and instructions are read from /proc/cpuinfo of x86-64")
    facts = dict(re.findall(r"^(vendor_id|flags)\s*: (.*)$", path.read_text(), re.MULTILINE))
    is_vectorised = {"avx2", "fma"} <= set(facts["flags"].split())
    is_intel = facts["vendor_id"] == "GenuineIntel"
    assert _cpp.has_tuned_blas() is (is_intel or not is_vectorised)


@pytest.mark.cpp
def test_fused_kernel_refuses_what_it_would_read_out_of_bounds():
    if reason := library_refusal():
        pytest.skip(reason)
    grad, rows, weight, (ids, offsets, order) = sample(count=20, is_sorted=False)
    fused = torch.ops.pinet_cpp.stratified_linear_fused
    outs = rows.new_empty(20, 17), rows.new_empty(4, 24, 17), rows.new_empty(4, 24)
    fused(grad, weight, rows, offsets, order, *outs)
    assert_close(outs, grad, rows, weight, ids, 4)
    for wrong in (
        (grad, weight, rows, offsets, order + 1, *outs),
        (grad, weight, rows, (0, 5, 3, 7, 20), order, *outs),
        (grad, weight, rows, (0, 5, 6, 7, 21), order, *outs),
        (grad, weight[:-1], rows, offsets, order, *outs),
        (grad, None, rows, offsets, order, *outs),
        (grad[:-1], weight, rows, offsets, order, *outs),
        (grad.double(), weight, rows, offsets, order, *outs),
        (grad, weight, rows, offsets, order, outs[0][:-1], *outs[1:]),
        (grad, weight, rows, offsets, order, outs[0], outs[1].transpose(1, 2), outs[2]),
    ):
        with pytest.raises(RuntimeError, match="stratified_linear_fused"):
            fused(*wrong)


def test_addresses_beyond_int32(backend):
    distance = 2**31 + 5
    try:
        storage = torch.empty(distance + 7)  # pages that nobody touches cost nothing
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    far = storage.as_strided((2, 7), (distance, 1))
    far.copy_(torch.randn(2, 7))
    ids = torch.tensor([0, 1])
    grad, weight = torch.randn(2, 3), torch.randn(3, 7)
    outs = stratified_linear_backward(grad, far, weight, ids, (0, 1, 2), backend=backend.name)
    assert_close(outs, grad, far, weight, ids, 2)
