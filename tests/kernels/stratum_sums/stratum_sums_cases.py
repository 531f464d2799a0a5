"""Inputs and the float64 oracle of ``stratum_sums``."""

from __future__ import annotations

import torch

# At most 32 numbers are summed in the dtype of the rows, then in float64, with one rounding.
# Relative to the sum of magnitudes, which bounds what any order of summation can lose.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14, torch.float16: 1e-7, torch.bfloat16: 1e-7}

LAYOUTS = ("contiguous", "transposed", "strided", "padded", "expanded", "one row")


def make_rows(count, width, layout, dtype, generator):
    """Return rows [N, D] of the given memory layout."""

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
    if layout == "one row":
        return normal(1, width).expand(count, width)
    return normal(count, width)


def make_ids(count, num_strata, order, generator):
    """Return int64 [N], sorted or not; some strata may be empty."""
    ids = torch.randint(0, num_strata, (count,), generator=generator)
    return ids.sort().values if order == "sorted" else ids


def oracle(rows, ids, num_strata):
    """Return the sums [S, D] in float64, by selecting the rows of every stratum."""
    return torch.stack([rows[ids == s].double().sum(0) for s in range(num_strata)])


def assert_close(out, rows, ids, num_strata):
    """Check ``out`` against the oracle, and that empty strata are exactly zero."""
    half = rows.dtype in (torch.float16, torch.bfloat16)
    assert out.dtype == (torch.float32 if half else rows.dtype)
    assert out.shape == (num_strata, rows.shape[1])
    bound = TOLERANCE[rows.dtype] * oracle(rows.abs(), ids, num_strata)
    assert ((out.double() - oracle(rows, ids, num_strata)).abs() <= bound).all()
