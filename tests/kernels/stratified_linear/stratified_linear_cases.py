"""Inputs and the float64 oracle of ``stratified_linear_backward``."""

from __future__ import annotations

import torch

LAYOUTS = ("contiguous", "transposed", "strided", "padded", "expanded")


def rounding(dtype, num_terms):
    """Return what a sum of products may lose of its sum of magnitudes, in any order.

    The order is BLAS's own: equal terms added one after the other all round the same way. Half an
    epsilon a term is the bound of any order (Higham, Accuracy and Stability of Numerical
    Algorithms, equation 3.5), and the float64 oracle may lose as much again.
    """
    return (num_terms + 4) * torch.finfo(dtype).eps


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
    for out, right, size, terms in zip(
        outs, expected, sizes, (grad.shape[1], rows.shape[0], rows.shape[0]), strict=True
    ):
        assert out.shape == right.shape
        assert ((out.double() - right).abs() <= rounding(rows.dtype, terms) * size).all()
