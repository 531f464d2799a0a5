"""Inputs and the float64 oracle of ``stratum_gram``, shared with the interpreter's process."""

from __future__ import annotations

import torch

# Products are summed in float32 over at most 512 of them, then in float64: 512 * 2**-24 at worst.
# Relative to the product of the norms, which bounds what any summation order can lose.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12, torch.float16: 3e-5, torch.bfloat16: 3e-5}

LAYOUTS = ("contiguous", "transposed", "strided", "padded", "expanded")


def make_grad(shape, layout, dtype, generator):
    """Return a gradient [S, ...] of the given memory layout."""
    strata, *rest = shape
    if layout == "transposed":
        return (
            torch.randn((*reversed(rest), strata), generator=generator)
            .to(dtype)
            .permute(*reversed(range(len(shape))))
        )
    if layout == "strided":
        wide = torch.randn((strata, *rest, 2), generator=generator).to(dtype)
        return wide[..., 1]
    if layout == "padded":  # contiguous slices, odd distance between strata
        count = int(torch.tensor(rest).prod())
        wide = torch.randn((strata, count + 3), generator=generator).to(dtype)
        return wide[:, 1 : count + 1].unflatten(1, rest) if rest else wide[:, 0]
    if layout == "expanded":
        return torch.randn(rest, generator=generator).to(dtype).expand(shape)
    return torch.randn(shape, generator=generator).to(dtype)


def oracle(grads):
    """Return the Gram [P, S, S] by einsum in float64."""
    out = []
    for grad in grads:
        rows = (
            grad.double().reshape(grad.shape[0], -1)
            if grad.numel()
            else grad.new_zeros((grad.shape[0], 1), dtype=torch.float64)
        )
        out.append(torch.einsum("sc,tc->st", rows, rows))
    return torch.stack(out)


def assert_close(out, grads):
    """Check ``out`` against the oracle, and that it is exactly symmetric."""
    expected = oracle(grads)
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    bounds = torch.tensor([TOLERANCE[grad.dtype] for grad in grads], dtype=torch.float64)
    assert out.dtype == torch.float64
    assert out.shape == expected.shape
    assert ((out - expected).abs() <= bounds[:, None, None] * scale).all()
    assert torch.equal(out, out.mT)
