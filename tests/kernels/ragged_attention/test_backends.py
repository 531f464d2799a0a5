from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ragged_attention_cases import (
    LAYOUTS,
    assert_close,
    gradient_oracle,
    kept_weights,
    make,
    make_offsets,
    oracle,
)

from pinet_fast.kernels import _registry, ragged_attention

fixture_is_constant = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 128]))


@st.composite
def cases(draw, longest=70):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(0, longest), max_size=8))
    heads, width = draw(st.integers(1, 3)), draw(WIDTHS)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    events = sum(lengths)
    qkv = make((events, 3, heads, width), draw(st.sampled_from(LAYOUTS)), dtype, generator)
    grad = make((events, heads, width), draw(st.sampled_from(LAYOUTS)), dtype, generator)
    return grad, qkv, make_offsets(lengths)


def sample(lengths, heads=2, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    events = sum(lengths)
    qkv = make((events, 3, heads, width), "contiguous", dtype, generator)
    grad = make((events, heads, width), "contiguous", dtype, generator)
    return grad, qkv, make_offsets(lengths)


def run(backend, grad, qkv, offsets, **options):
    """Return the output and the gradient of ``qkv``."""
    qkv = qkv.detach().requires_grad_()
    out = ragged_attention(qkv, offsets, backend=backend.name, **options)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


@fixture_is_constant
@given(case=cases())
def test_agrees_with_the_oracle(backend, case):
    grad, qkv, offsets = case
    out, gradient = run(backend, *case)
    assert_close(out, oracle(qkv, offsets), qkv.dtype)
    if qkv.numel():
        assert_close(gradient, gradient_oracle(grad, qkv, offsets), qkv.dtype)


@settings(fixture_is_constant, max_examples=20)
@given(
    case=cases(longest=10), rate=st.sampled_from([0.1, 0.5, 0.97]), seed=st.integers(-(2**63), 9)
)
def test_dropout_agrees_with_the_oracle(backend, case, rate, seed):
    grad, qkv, offsets = case
    out, gradient = run(backend, *case, dropout=rate, seed=torch.tensor([seed]))
    assert_close(out, oracle(qkv, offsets, rate, seed), qkv.dtype)
    if qkv.numel():
        assert_close(gradient, gradient_oracle(grad, qkv, offsets, rate, seed), qkv.dtype)


# Beyond a tile of queries, a block of keys, a chunk, and two chunks.
@pytest.mark.parametrize("lengths", [[65, 1, 64], [257, 300], [513, 30, 512], [1100]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_users_agree_with_the_oracle(backend, lengths, dtype):
    grad, qkv, offsets = sample(lengths, heads=2, width=24, dtype=dtype)
    out, gradient = run(backend, grad, qkv, offsets)
    assert_close(out, oracle(qkv, offsets), dtype)
    assert_close(gradient, gradient_oracle(grad, qkv, offsets), dtype)


def test_dropout_of_long_users_is_that_of_the_reference(backend):
    """The oracle draws one weight at a time; the reference, which agrees with it, is faster."""
    case = sample([600, 3, 270], dtype=torch.float64)
    options = {"dropout": 0.3, "seed": torch.tensor([77])}
    (reference,) = [b for b in _registry.backends("ragged_attention") if b.name == "reference"]
    for mine, theirs in zip(
        run(backend, *case, **options), run(reference, *case, **options), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@fixture_is_constant
@given(case=cases())
def test_writes_every_element_of_poisoned_outputs_and_nothing_else(backend, case):
    grad, qkv, offsets = case
    events, _, heads, width = qkv.shape
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    shapes = ((events, heads, width), (events, heads), (events, 3, heads, width))
    guarded = [torch.full((n + 2, *rest), torch.nan, dtype=qkv.dtype) for n, *rest in shapes]
    out, lse, gradient = [guard[1:-1] for guard in guarded]
    inputs = (qkv, offsets, longest, 0.0, None, out, lse)
    backend.impl(*inputs)
    (backward,) = [
        b for b in _registry.backends("ragged_attention_backward") if b.name == backend.name
    ]
    backward.impl(grad, *inputs, gradient)
    assert_close(out, oracle(qkv, offsets), qkv.dtype)
    assert lse.isfinite().all()
    assert gradient.isfinite().all()
    for guard in guarded:
        assert guard[0].isnan().all()
        assert guard[-1].isnan().all()


@pytest.mark.parametrize("length", [1, 2, 50, 64, 130])
def test_equal_lengths_are_torchs_own_attention(backend, length):
    grad, qkv, offsets = sample([length] * 3, heads=2, width=32, dtype=torch.float64)
    out, gradient = run(backend, grad, qkv, offsets)
    qkv.requires_grad_()
    q, k, v = qkv.view(3, length, 3, 2, 32).permute(2, 0, 3, 1, 4)
    right = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, right.reshape(-1, 2, 32))
    (theirs,) = torch.autograd.grad(right, qkv, grad.view(3, length, 2, 32))
    torch.testing.assert_close(gradient, theirs)


@pytest.mark.parametrize("lengths", [[5, 9, 2], [70, 300, 40], [3, 0, 600]])
def test_a_nan_stays_with_its_user(backend, lengths):
    grad, qkv, offsets = sample(lengths)
    qkv[offsets[1] - 1] = torch.nan
    out, gradient = run(backend, grad, qkv, offsets)
    assert out[: offsets[1]].isnan().any()
    assert out[offsets[1] :].isfinite().all()
    assert gradient[offsets[1] :].isfinite().all()


def test_one_user_alone_is_equal_to_the_bit(backend):
    """No user's result depends on who else is in the batch."""
    grad, qkv, offsets = sample([7, 50, 700, 1, 64])
    out, gradient = run(backend, grad, qkv, offsets, max_len=700)
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = run(backend, grad[a:b], qkv[a:b], torch.tensor([0, b - a]), max_len=700)
        if backend.name == "cpp":
            assert torch.equal(alone[0], out[a:b])
            assert torch.equal(alone[1], gradient[a:b])
        torch.testing.assert_close(alone[0], out[a:b], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[1], gradient[a:b], rtol=1e-4, atol=1e-4)


def test_later_events_change_nothing(backend):
    _, qkv, offsets = sample([40, 300])
    before = ragged_attention(qkv, offsets, backend=backend.name)
    changed = qkv.clone()
    changed[200:340] += 1
    after = ragged_attention(changed, offsets, backend=backend.name)
    assert torch.equal(before[:200], after[:200])
    assert not torch.equal(before[200:], after[200:])


@pytest.mark.parametrize("size", [1e4, 1e-30])
def test_large_and_tiny_scores(backend, size):
    grad, qkv, offsets = sample([50, 9], dtype=torch.float64)
    qkv[:, :2] *= size**0.5
    out, gradient = run(backend, grad, qkv, offsets)
    torch.testing.assert_close(out, oracle(qkv, offsets), rtol=1e-9, atol=1e-9)
    right = gradient_oracle(grad, qkv, offsets)
    assert (gradient - right).abs().max() <= 1e-9 * right.abs().max()


def test_repeats_are_equal_to_the_bit_whatever_the_threads(backend):
    grad, qkv, offsets = sample([50, 3, 1300, 200, 8] * 2, width=32)
    options = {"dropout": 0.2, "seed": torch.tensor([5])}
    first = run(backend, grad, qkv, offsets, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3) if backend.name == "cpp" else (threads, threads):
            torch.set_num_threads(count)
            other = run(backend, grad, qkv, offsets, **options)
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_masks_are_fair_and_independent():
    """The mask of the specification: its rate, and no correlation of neighbours."""
    kept, scale = kept_weights(123456789, 0.25, make_offsets([90]), heads=2)
    mask = kept[0].double()
    assert scale == pytest.approx(4 / 3)
    count = mask.numel()
    assert abs(mask.mean() - 0.75) < 5 * (0.1875 / count) ** 0.5
    centred = mask - 0.75
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2)):
        assert abs((centred * other).mean()) < 5 * 0.1875 / count**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    grad, qkv, offsets = sample([5, 30], dtype=dtype)
    qkv.requires_grad_()
    out = ragged_attention(qkv, offsets)
    assert out.dtype is dtype
    (gradient,) = torch.autograd.grad(out, qkv, grad)
    assert gradient.dtype is dtype
    exact, right = oracle(qkv, offsets), gradient_oracle(grad, qkv, offsets)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(gradient.double(), right, rtol=2e-2, atol=4e-2)


def test_addresses_beyond_int32(backend):
    distance = 2**31 + 5
    try:
        storage = torch.empty(distance + 64)  # pages that nobody touches cost nothing
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    far = storage.as_strided((2, 3, 1, 7), (distance, 7, 7, 1))
    far.copy_(torch.randn(2, 3, 1, 7))
    offsets = make_offsets([2])
    assert_close(
        ragged_attention(far, offsets, backend=backend.name), oracle(far, offsets), torch.float32
    )
