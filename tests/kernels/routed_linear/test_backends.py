from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routed_linear_cases import (
    LAYOUTS,
    assert_close,
    assert_gradients_close,
    make,
    make_routes,
    oracle,
)

from pinet_fast.kernels import _registry, routed_linear

fixture_is_constant = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
backward = torch.ops.pinet.routed_linear_backward.default


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    num_heads = draw(st.integers(1, 9))
    count = draw(st.integers(0, 70))
    wide, deep = (draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 65]))) for _ in "ab")
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))

    def drawn(*shape):
        return make(shape, draw(st.sampled_from(LAYOUTS)), dtype, generator)

    bias = drawn(num_heads, wide) if draw(st.booleans()) else None
    routes = make_routes(count, num_heads, draw(st.booleans()), generator)
    grad, rows = drawn(count, wide), drawn(count, deep)
    return grad, rows, drawn(num_heads, wide, deep), bias, routes


def sample(count=500, wide=24, deep=17, num_heads=4, is_sorted=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        make(shape, "contiguous", dtype, generator)
        for shape in ((count, wide), (count, deep), (num_heads, wide, deep), (num_heads, wide))
    ]
    return (*tensors, make_routes(count, num_heads, is_sorted, generator))


@fixture_is_constant
@given(case=cases())
def test_agrees_with_the_oracle(backend, case):
    grad, rows, weight, bias, (ids, offsets, order) = case
    out = routed_linear(rows, weight, bias, ids, offsets, order, backend=backend.name)
    assert_close(out, rows, weight, bias, ids)
    outs = backward(
        grad, rows, weight, ids, offsets, order, True, True, True, backend.name
    )  # fmt: skip
    assert_gradients_close(outs, grad, rows, weight, ids)


@fixture_is_constant
@given(case=cases())
def test_writes_every_element_of_poisoned_outputs_and_nothing_else(backend, case):
    grad, rows, weight, bias, (ids, offsets, order) = case
    num_heads, wide, deep = weight.shape
    shapes = ((len(rows), wide), (len(rows), deep), (num_heads, wide, deep), (num_heads, wide))
    guarded = [torch.full((n + 2, *rest), torch.nan, dtype=rows.dtype) for n, *rest in shapes]
    out, *outs = [guard[1:-1] for guard in guarded]
    backend.impl(rows, weight, bias, ids, offsets, order, out)
    (gradients,) = [
        b for b in _registry.backends("routed_linear_backward") if b.name == backend.name
    ]
    gradients.impl(grad, rows, weight, ids, offsets, order, *outs)
    assert_close(out, rows, weight, bias, ids)
    assert_gradients_close(outs, grad, rows, weight, ids)
    for guard in guarded:
        assert guard[0].isnan().all()
        assert guard[-1].isnan().all()


def test_one_head_is_torchs_own_layer(backend):
    grad, rows, weight, bias, _ = sample(num_heads=1)
    zeros = torch.zeros(500, dtype=torch.int64)
    inputs = [t.requires_grad_() for t in (rows, weight, bias)]
    out = routed_linear(*inputs, zeros, (0, 500), backend=backend.name)
    right = F.linear(rows, weight[0], bias[0])
    assert torch.equal(out, right)
    mine = torch.autograd.grad(out, inputs[:2], grad)
    theirs = torch.autograd.grad(right, inputs[:2], grad)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("is_sorted", [True, False])
def test_equals_a_loop_of_linear_to_the_bit(backend, is_sorted):
    _, rows, weight, bias, (ids, offsets, order) = sample(is_sorted=is_sorted)
    out = routed_linear(rows, weight, bias, ids, offsets, order, backend=backend.name)
    for h in range(4):
        assert torch.equal(out[ids == h], F.linear(rows[ids == h], weight[h], bias[h]))


@pytest.mark.parametrize("is_sorted", [True, False])
def test_a_nan_stays_with_its_row_and_head(backend, is_sorted):
    grad, rows, weight, bias, (ids, offsets, order) = sample(is_sorted=is_sorted)
    rows[123, 5] = torch.nan
    out = routed_linear(rows, weight, bias, ids, offsets, order, backend=backend.name)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [123]
    _, of_weight, of_bias = backward(
        grad, rows, weight, ids, offsets, order, True, True, True, backend.name
    )
    assert of_weight.isnan().any(2).any(1).nonzero().flatten().tolist() == [int(ids[123])]
    assert of_bias.isfinite().all()
    weight[2, 3, 4] = torch.nan
    out = routed_linear(rows, weight, bias, ids, offsets, order, backend=backend.name)
    assert torch.equal(out[:, 3].isnan(), (ids == 2) | (torch.arange(500) == 123))


def test_heads_without_rows_get_exact_zeros_and_one_row_heads_their_product(backend):
    grad, rows, weight, bias, _ = sample(count=2)
    ids, offsets = torch.tensor([1, 3]), (0, 0, 1, 1, 2)
    out = routed_linear(rows, weight, bias, ids, offsets, backend=backend.name)
    assert_close(out, rows, weight, bias, ids)
    _, of_weight, of_bias = backward(
        grad, rows, weight, ids, offsets, None, True, True, True, backend.name
    )
    assert torch.equal(of_weight[[0, 2]], torch.zeros(2, 24, 17))
    assert torch.equal(of_weight[[1, 3]], grad.unsqueeze(2) * rows.unsqueeze(1))
    assert torch.equal(of_bias[[0, 2]], torch.zeros(2, 24))


@pytest.mark.parametrize("is_sorted", [True, False])
def test_repeats_are_equal_to_the_bit(backend, is_sorted):
    grad, rows, weight, bias, routes = sample(3000, 64, 64, is_sorted=is_sorted)
    ids, offsets, order = routes
    runs = [
        (
            routed_linear(rows, weight, bias, *routes, backend=backend.name),
            *backward(grad, rows, weight, ids, offsets, order, True, True, True, backend.name),
        )
        for _ in range(5)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    grad, rows, weight, bias, (ids, offsets, order) = sample(is_sorted=False, dtype=dtype)
    inputs = [t.requires_grad_() for t in (rows, weight, bias)]
    out = routed_linear(*inputs, ids, offsets, order)
    assert out.dtype is dtype
    with torch.no_grad():
        torch.testing.assert_close(
            out, oracle(rows, weight, bias, ids).to(dtype), rtol=1e-2, atol=1e-1
        )
    for p, gradient in zip(inputs, torch.autograd.grad(out, inputs, grad), strict=True):
        assert gradient.dtype is dtype
        assert gradient.shape == p.shape
        assert gradient.isfinite().all()


def test_addresses_beyond_int32(backend):
    distance = 2**31 + 5
    try:
        storage = torch.empty(distance + 7)  # pages that nobody touches cost nothing
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    far = storage.as_strided((2, 7), (distance, 1))
    far.copy_(torch.randn(2, 7))
    ids, weight = torch.tensor([0, 1]), torch.randn(2, 3, 7)
    out = routed_linear(far, weight, None, ids, (0, 1, 2), backend=backend.name)
    assert_close(out, far, weight, None, ids)
