"""Inputs and the float64 oracle of ``ragged_attention``."""

from __future__ import annotations

import itertools

import torch

LAYOUTS = ("contiguous", "strided", "padded", "by_head", "expanded")

# A few epsilons of the largest value or gradient: weights sum to one, so sums over keys do not grow
# with their number, and sums over queries have at most some hundred terms here.
TOL = {torch.float32: 2e-5, torch.float64: 5e-14}


def make(shape, layout, dtype, generator):
    """Return [T, ..., H, D] of the given memory layout."""

    def normal(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype)

    *lead, heads, width = shape
    if layout == "strided":
        return normal(*shape, 2)[..., 1]
    if layout == "padded":  # contiguous columns, odd distance between heads
        return normal(*lead, heads, width + 3)[..., 1 : width + 1]
    if layout == "by_head":
        return normal(heads, *lead, width).movedim(0, -2)
    if layout == "expanded":
        return normal(*[1] * (len(shape) - 1), width).expand(shape)
    return normal(*shape)


def make_offsets(lengths):
    """Return int64 [B + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0)


def kept_weights(seed, rate, offsets, heads):
    """Return which weights are kept, a bool [H, L, L] a user, as the specification says.

    Numbers are Python's own, one weight at a time.
    """
    threshold = min(max(int((1 - rate) * 2**32 + 0.5), 1), 2**32 - 1)
    kept = []
    for a, b in itertools.pairwise(offsets.tolist()):
        mask = torch.zeros(heads, b - a, b - a, dtype=torch.bool)
        for i, h, j in itertools.product(range(b - a), range(heads), range(b - a)):
            z = (seed + 0x9E3779B97F4A7C15 * ((a + i) * heads + h + 1)) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            z ^= z >> 31
            x = (j * 0x9E3779B9 + z) % 2**32
            x = ((x ^ x >> 16) * 0x7FEB352D + (z >> 32)) % 2**32
            x = (x ^ x >> 15) * 0x846CA68B % 2**32
            x ^= x >> 16
            mask[h, i, j] = x < threshold
        kept.append(mask)
    return kept, 2**32 / threshold


def oracle(qkv, offsets, rate=0.0, seed=0):
    """Return the output in float64, differentiable, one user and head at a time."""
    heads = qkv.shape[2]
    users = list(itertools.pairwise(offsets.tolist()))
    factors = [torch.ones(heads, b - a, b - a) for a, b in users]
    if rate > 0:
        kept, scale = kept_weights(seed, rate, offsets, heads)
        factors = [mask.double() * scale for mask in kept]
    rows = [[qkv.new_zeros(0, 1, qkv.shape[3]).double()] for _ in range(heads)]
    for (a, b), factor in zip(users, factors, strict=True):
        for h in range(heads):
            q, k, v = qkv[a:b, :, h].double().unbind(1)
            future = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
            scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill(future, -torch.inf)
            rows[h].append(((torch.softmax(scores, 1) * factor[h]) @ v).unsqueeze(1))
    return torch.cat([torch.cat(parts) for parts in rows], dim=1)


def gradient_oracle(grad, qkv, offsets, rate=0.0, seed=0):
    """Return the gradient of ``qkv`` in float64."""
    qkv = qkv.detach().double().requires_grad_()
    out = oracle(qkv, offsets, rate, seed)
    return torch.autograd.grad(out, qkv, grad.double(), allow_unused=True)[0]


def assert_close(got, right, dtype):
    """Check against float64, relative to the largest magnitude."""
    assert got.shape == right.shape
    if right.numel():
        error = (got.double() - right).abs().max()
        assert error <= TOL[dtype] * right.abs().max().clamp_min(1)
