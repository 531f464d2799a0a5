"""Inputs and the float64 oracle of ``stratum_combine``, shared with the interpreter's process."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

LAYOUTS = ("contiguous", "reversed", "strided", "padded", "expanded")
OUT_LAYOUTS = ("contiguous", "reversed", "strided")
# S + 1 roundings of the dtype that sums are made in, and one of the dtype that is stored.
EPS = {d: torch.finfo(d).eps for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


@dataclass
class Case:
    """Arguments of one call, with room for several parameters."""

    strata: int
    generator: torch.Generator
    grads: list = field(default_factory=list)
    outs: list = field(default_factory=list)
    accumulate: list = field(default_factory=list)
    rows: list = field(default_factory=list)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def add(
        self, shape, layout="contiguous", out_layout="contiguous", dtype=torch.float32,
        out_dtype=None, accumulate=False, rows=None, num_rows=None,
    ):  # fmt: skip
        """Add a parameter with gradients [S, *shape]; its output holds NaN unless added to."""
        out_dtype = out_dtype or dtype
        out_shape = shape if rows is None else (num_rows, *shape[1:])
        self.grads.append(self.laid_out((self.strata, *shape), layout).to(dtype=dtype))
        if layout == "expanded":
            self.grads[-1] = self.grads[-1][:1].expand(self.strata, *shape)
        out = self.laid_out(out_shape, out_layout).to(out_dtype)
        if not accumulate:
            out.fill_(torch.nan)
        self.outs.append(out)
        self.accumulate.append(accumulate)
        self.rows.append(None if rows is None else torch.tensor(rows, dtype=torch.int64))
        return self

    def laid_out(self, shape, layout):
        """Return random numbers in the given memory layout."""
        if layout == "reversed":
            return self.normal(*reversed(shape)).permute(tuple(reversed(range(len(shape)))))
        if layout == "strided":
            return self.normal(*shape, 2)[..., 1]
        if layout == "padded" and len(shape) > 1:
            count = torch.Size(shape[1:]).numel()
            return self.normal(shape[0], count + 3)[:, 1 : count + 1].unflatten(1, shape[1:])
        return self.normal(*shape)

    def weights(self, per_parameter=False):
        """Return random weights, one stratum with 0 where there are several."""
        weights = self.normal(len(self.grads), self.strata)
        if self.strata > 1:
            weights[:, 1] = 0
        return weights if per_parameter else weights[0].clone()


def oracle(case, weights, scale=None):
    """Return what the outputs should become, float64, and the size of what was summed."""
    expected, sizes = [], []
    for p, (grad, out) in enumerate(zip(case.grads, case.outs, strict=True)):
        w = (weights if weights.dim() == 1 else weights[p]) * (1.0 if scale is None else scale)
        kept = [s for s in range(case.strata) if w[s] != 0]
        zero = torch.zeros(grad.shape[1:], dtype=torch.float64)
        total = sum((w[s] * grad[s].double() for s in kept), zero)
        size = sum((abs(w[s]) * grad[s].double().abs() for s in kept), zero)
        if case.rows[p] is not None:
            full = torch.zeros(2, *out.shape, dtype=torch.float64)
            for u, row in enumerate(case.rows[p].tolist()):
                full[0, row], full[1, row] = total[u], size[u]
            total, size = full
        if case.accumulate[p]:
            total, size = out.double() + total, out.double().abs() + size
        expected.append(total)
        sizes.append(size)
    return expected, sizes


def assert_close(case, expected, sizes):
    """Check the outputs against the oracle's numbers."""
    for p, (out, wanted, size) in enumerate(zip(case.outs, expected, sizes, strict=True)):
        summed_in = torch.promote_types(case.grads[p].dtype, out.dtype)
        eps = EPS[summed_in] if summed_in is torch.float64 else EPS[torch.float32]
        bound = size * eps * (case.strata + 2) + wanted.abs() * EPS[out.dtype]
        error = (out.double() - wanted).abs()
        assert (error <= bound + (6e-8 if out.dtype is torch.float16 else 1e-40)).all(), p
