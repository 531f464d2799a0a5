from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinet_fast.kernels import dropout_mask

COUNT = 400_000
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEEDS = st.integers(-(2**63), 2**63 - 1)
fixture_is_constant = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def kept_of(rate: float) -> int:
    return min(max(math.floor((1 - rate) * 65536 + 0.5), 1), 65535)


def split_mix(seed: int, count: int) -> list[int]:
    """SplitMix64 as its authors give it: one state, stepped."""
    out, state = [], seed % 2**64
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(z ^ (z >> 31))
    return out


@fixture_is_constant
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    rate=st.floats(1e-6, 1 - 1e-6),
    count=st.integers(1, 4),
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES[:2]),
)
def test_writes_zero_or_the_scale_everywhere_and_nothing_else(
    backend, shape, rate, count, seed, dtype
):
    size = count * math.prod(shape)
    guarded = torch.full((size + 32,), torch.nan, dtype=dtype)
    mask = guarded[16 : 16 + size].view(count, *shape)
    backend.impl(rate, seed, mask)
    scale = torch.tensor(65536 / kept_of(rate), dtype=dtype)
    assert ((mask == 0) | (mask == scale)).all()
    assert guarded[:16].isnan().all()
    assert guarded[16 + size :].isnan().all()
    again = dropout_mask(torch.empty(shape, dtype=dtype), rate, count=count, seed=seed,
                         backend=backend.name)  # fmt: skip
    assert torch.equal(again, mask)


@pytest.mark.cpp
@settings(max_examples=40, deadline=None)
@given(size=st.integers(0, 3000), rate=st.floats(0.001, 0.999), seed=SEEDS)
def test_cpp_draws_the_words_of_split_mix(size, rate, seed):
    words = np.array(split_mix(seed, -(-size // 4)), dtype=np.uint64)
    lanes = torch.from_numpy(words.view(np.uint16)[:size].astype(np.int64))
    expected = (lanes < kept_of(rate)).double() * (65536 / kept_of(rate))
    like = torch.empty(size, dtype=torch.float64)
    assert torch.equal(dropout_mask(like, rate, seed=seed, backend="cpp")[0], expected)


@pytest.mark.cpp
def test_cpp_has_the_same_bits_for_any_number_of_threads():
    like = torch.empty(1003, 401)
    before, masks = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            masks.append(dropout_mask(like, 0.3, seed=7, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("rate", [1e-4, 0.1, 0.2, 0.5, 0.9])
def test_rate_is_within_a_binomial_bound(backend, rate):
    mask = dropout_mask(torch.empty(COUNT), rate, seed=0, backend=backend.name)
    share = (mask == 0).double().mean().item()
    assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / COUNT) + 1 / 65536


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_neighbours_masks_and_seeds_are_independent(backend, rate):
    like, size = torch.empty(COUNT // 4, 4), COUNT // 4
    one = dropout_mask(like, rate, count=2, seed=0, backend=backend.name)
    other = dropout_mask(like, rate, count=2, seed=1, backend=backend.name)
    bound = 5 / math.sqrt(size)
    columns = torch.cat([*one, *other], 1).eq(0).double()
    correlation = torch.corrcoef(columns.t())
    assert (correlation - torch.eye(16)).abs().max() < bound
    flat = one.flatten().eq(0).double()
    for lag in (1, 2, 3, 5, 64, 256, 1024, 4096):
        assert abs(torch.corrcoef(torch.stack((flat[:-lag], flat[lag:])))[0, 1]) < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_a_mask(dtype):
    like = torch.empty(40, 33, dtype=dtype).t()  # not contiguous: the mask is
    mask = dropout_mask(like, 0.25, count=3, seed=5)
    assert (mask.shape, mask.dtype) == ((3, 33, 40), dtype)
    assert mask.is_contiguous()
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(65536 / 49152, dtype=dtype).item()}
