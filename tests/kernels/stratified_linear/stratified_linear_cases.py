"""Inputs and the float64 oracle of ``stratified_linear_backward``."""

from __future__ import annotations

import torch

LAYOUTS = ("contiguous", "transposed", "strided", "padded", "expanded")

# Of the sum of magnitudes: what BLAS may lose over a few thousand products.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14}


def make_matrix(count, width, layout, dtype, generator):
    """Return [count, width] of the given memory layout."""

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    if layout == "transposed":
        return normal(width, count).t()
    if layout == "strided":
        return normal(count, width, 2)[..., 1]
    if layout == "padded":  # contiguous columns, odd distance between rows
        return normal(count, width + 3)[:, 1 : width + 1]
    if layout == "expanded":  # the gradient of a sum
        return normal(1, 1).expand(count, width)
    return normal(count, width)


def make_strata(count, num_strata, is_sorted, generator):
    """Return ids [N], row offsets (S + 1 ints) and the sorting permutation or None."""
    ids = torch.randint(0, num_strata, (count,), generator=generator)
    ids = ids.sort().values if is_sorted else ids
    offsets = (0, *torch.bincount(ids, minlength=num_strata).cumsum(0).tolist())
    return ids, offsets, None if is_sorted else torch.argsort(ids, stable=True)


def oracle(grad, rows, weight, ids, num_strata):
    """Return the three gradients in float64, by selecting the rows of every stratum."""
    grad, rows, weight = grad.double(), rows.double(), weight.double()
    members = [ids == s for s in range(num_strata)]
    return (
        grad @ weight,
        torch.stack([grad[m].t() @ rows[m] for m in members]),
        torch.stack([grad[m].sum(0) for m in members]),
    )


def assert_close(outs, grad, rows, weight, ids, num_strata):
    """Check the gradients against the oracle; bounds come from the sums of magnitudes."""
    expected = oracle(grad, rows, weight, ids, num_strata)
    sizes = oracle(grad.abs(), rows.abs(), weight.abs(), ids, num_strata)
    for out, right, size in zip(outs, expected, sizes, strict=True):
        assert out.shape == right.shape
        assert ((out.double() - right).abs() <= TOLERANCE[rows.dtype] * size).all()
