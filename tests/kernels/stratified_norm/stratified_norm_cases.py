"""Inputs and the float64 oracle of ``stratified_norm_backward``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LAYOUTS = ("contiguous", "transposed", "strided", "padded", "expanded")
EPS = 1e-5


@dataclass
class Case:
    """One call: ``arguments()`` is what the op takes."""

    grad: torch.Tensor
    rows: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor
    weight: torch.Tensor | None
    ids: torch.Tensor
    num_strata: int

    def arguments(self):
        return (
            self.grad, self.rows, self.mean, self.rstd, self.weight, self.ids, self.num_strata
        )  # fmt: skip


def layouted(count, width, layout, dtype, generator):
    """Return normal numbers [N, D] of the given memory layout."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "transposed":
        return normal(width, count).t()
    if layout == "strided":
        return normal(count, width, 2)[..., 1]
    if layout == "padded":  # contiguous columns, odd distance between rows
        return normal(count, width + 3)[:, 1 : width + 1]
    if layout == "expanded":  # the gradient of a sum
        return normal(1, 1).expand(count, width)
    return normal(count, width)


def make_case(
    count, width, num_strata=3, *, dtype=torch.float32, order="any", layouts=("contiguous",) * 2,
    has_weight=True, seed=0,
):  # fmt: skip
    """Return a case whose statistics are those of its rows; some strata may be empty."""
    generator = torch.Generator().manual_seed(seed)
    grad = layouted(count, width, layouts[0], dtype, generator)
    # Rows must vary, or their inverse deviation says more about eps than about them.
    layout = "contiguous" if layouts[1] == "expanded" else layouts[1]
    rows = layouted(count, width, layout, dtype, generator)
    weight = torch.randn(width, generator=generator).to(dtype) if has_weight else None
    ids = torch.randint(0, num_strata, (count,), generator=generator)
    if order == "sorted":
        ids = ids.sort().values
    wide = rows.float() if dtype in (torch.bfloat16, torch.float16) else rows
    mean = wide.sum(1) / max(width, 1)
    variance = (wide - mean[:, None]).square().sum(1) / max(width, 1)
    rstd = (variance + EPS).rsqrt()
    return Case(grad, rows, mean, rstd, weight, ids, num_strata)


def oracle(case, magnitudes=False):
    """Return the three gradients in float64, strata by selection, row by row as written.

    Args:
        case: The case.
        magnitudes: Sum magnitudes instead: what relative errors are relative to.
    """
    maybe_abs = torch.abs if magnitudes else lambda x: x
    grad, rstd = case.grad.double(), case.rstd.double()[:, None]
    normed = (case.rows.double() - case.mean.double()[:, None]) * rstd
    g = grad if case.weight is None else grad * case.weight.double()
    if magnitudes:
        averages = g.abs().mean(1, keepdim=True) + normed.abs() * (g * normed).abs().mean(
            1, keepdim=True
        )
        grad_rows = rstd * (g.abs() + averages)
    else:
        averages = g.mean(1, keepdim=True) + normed * (g * normed).mean(1, keepdim=True)
        grad_rows = rstd * (g - averages)
    groups = [case.ids == s for s in range(case.num_strata)]
    return (
        grad_rows,
        torch.stack([maybe_abs(grad[where] * normed[where]).sum(0) for where in groups]),
        torch.stack([maybe_abs(grad[where]).sum(0) for where in groups]),
    )


def by_autograd(case):
    """Return the three gradients by ``F.layer_norm``, one backward a stratum, in float64."""
    rows = case.rows.double().requires_grad_()
    width = rows.shape[1]
    weight = torch.ones(width) if case.weight is None else case.weight
    weight = weight.double().requires_grad_()
    bias = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    out = F.layer_norm(rows, (width,), weight, bias, EPS)
    parts = [
        torch.autograd.grad(
            out,
            (rows, weight, bias),
            case.grad.double() * (case.ids == s)[:, None],
            retain_graph=True,
        )
        for s in range(case.num_strata)
    ]
    grad_rows, grad_weight, grad_bias = zip(*parts, strict=True)
    return sum(grad_rows), torch.stack(grad_weight), torch.stack(grad_bias)


def assert_close(got, case):
    """Check what is not None against the oracle; sums relative to those of magnitudes."""
    half = case.rows.dtype in (torch.float16, torch.bfloat16)
    sums_dtype = torch.float32 if half else case.rows.dtype
    bounds = oracle(case, magnitudes=True)
    for i, (out, expected, scale) in enumerate(zip(got, oracle(case), bounds, strict=True)):
        if out is None:
            continue
        dtype = sums_dtype if i else case.rows.dtype
        assert out.dtype == dtype
        assert out.shape == expected.shape
        # A dozen roundings a number; averages of D numbers lose a few more.
        allowed = 24 * torch.finfo(dtype).eps * scale
        assert ((out.double() - expected).abs() <= allowed).all(), i
