"""Inputs and the float64 oracle of ``routed_linear``."""

from __future__ import annotations

import torch

LAYOUTS = ("contiguous", "transposed", "strided", "padded", "expanded")


def rounding(dtype, num_terms):
    """Return what a sum of products may lose of its sum of magnitudes, in any order.

    Half an epsilon a term is the bound of any order (Higham, Accuracy and Stability of Numerical
    Algorithms, equation 3.5), and the float64 oracle may lose as much again.
    """
    return (num_terms + 4) * torch.finfo(dtype).eps


def make(shape, layout, dtype, generator):
    """Return a tensor [..., R, C] of the given memory layout."""
    *lead, count, width = shape

    def normal(*last):
        return torch.randn((*lead, *last), generator=generator).to(dtype)

    if layout == "transposed":
        return normal(width, count).transpose(-1, -2)
    if layout == "strided":
        return normal(count, width, 2)[..., 1]
    if layout == "padded":  # contiguous columns, odd distance between rows
        return normal(count, width + 3)[..., 1 : width + 1]
    if layout == "expanded":
        return normal(1, 1).expand(shape)
    return normal(count, width)


def make_routes(count, num_heads, is_sorted, generator):
    """Return ids [N], row offsets (H + 1 ints) and the sorting permutation or None."""
    ids = torch.randint(0, num_heads, (count,), generator=generator)
    ids = ids.sort().values if is_sorted else ids
    offsets = (0, *torch.bincount(ids, minlength=num_heads).cumsum(0).tolist())
    return ids, offsets, None if is_sorted else torch.argsort(ids, stable=True)


def oracle(rows, weight, bias, ids):
    """Return the outputs in float64, one row at a time."""
    out = torch.zeros(len(rows), weight.shape[1], dtype=torch.float64)
    for i, h in enumerate(ids.tolist()):
        out[i] = weight[h].double() @ rows[i].double()
        if bias is not None:
            out[i] += bias[h].double()
    return out


def gradient_oracle(grad, rows, weight, ids):
    """Return the gradients of rows, weight and bias in float64, one row at a time."""
    grad, rows, weight = grad.double(), rows.double(), weight.double()
    of_rows, of_weight = torch.zeros_like(rows), torch.zeros_like(weight)
    of_bias = torch.zeros(weight.shape[:2], dtype=torch.float64)
    for i, h in enumerate(ids.tolist()):
        of_rows[i] = grad[i] @ weight[h]
        of_weight[h] += torch.outer(grad[i], rows[i])
        of_bias[h] += grad[i]
    return of_rows, of_weight, of_bias


def assert_close(out, rows, weight, bias, ids):
    """Check the outputs against the oracle; bounds come from the sums of magnitudes."""
    right = oracle(rows, weight, bias, ids)
    size = oracle(rows.abs(), weight.abs(), None if bias is None else bias.abs(), ids)
    assert out.shape == right.shape
    assert ((out.double() - right).abs() <= rounding(rows.dtype, rows.shape[1] + 1) * size).all()


def assert_gradients_close(outs, grad, rows, weight, ids):
    """Check the gradients against the oracle; bounds come from the sums of magnitudes."""
    expected = gradient_oracle(grad, rows, weight, ids)
    sizes = gradient_oracle(grad.abs(), rows.abs(), weight.abs(), ids)
    terms = (grad.shape[1], rows.shape[0], rows.shape[0])
    for out, right, size, count in zip(outs, expected, sizes, terms, strict=True):
        assert out.shape == right.shape
        assert ((out.double() - right).abs() <= rounding(rows.dtype, count) * size).all()
