"""The shortest support of a ball over the simplex: a second-order cone program in Gram terms."""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 28
_CENTRING = 0.2  # each iteration aims at this share of the complementarity gap
_TO_BOUNDARY = 0.99  # share of the way to the boundary that a step may go
_FLOOR = 1e-10  # the gap at which iterates stay
_RIDGE = 1e-12  # keeps lengths above the rounding of a singular Gram
_INSIDE = 1e-9  # least relative distance to the cone's boundary that is told from rounding


def support(gram: Tensor, linear: Tensor, radius: Tensor) -> Tensor:
    """Minimise ``linear . w + radius ||g_w||`` over the simplex, ``||g_w||^2 = w^T G w``.

    A primal-dual interior-point method with Nesterov-Todd scaling on (w, s >= ||g_w||), written in
    the coefficients of the gradients, so that it needs their Gram alone: no branches on values,
    hence no host sync, and batched.

    Args:
        gram: [..., K, K], of order one.
        linear: [..., K].
        radius: [..., 1], above 0.

    Returns:
        The coefficients [..., K] of ``radius g_w / ||g_w||``; its length is below ``radius`` also
        where ``g_w = 0``, where they are the dual solution.

    Source:
        Nesterov and Todd, Self-scaled barriers and interior-point methods for convex programming
        (1997); the formulas for one cone follow from its definition of the scaling point.
    """
    num_strata = linear.shape[-1]
    unit = torch.eye(num_strata, dtype=gram.dtype, device=gram.device)
    gram = gram + _RIDGE * unit
    w = torch.full_like(linear, 1 / num_strata)
    z = linear - linear.amin(-1, keepdim=True) + 1  # duals of w >= 0
    s = gram.mean(-1).mean(-1, keepdim=True).sqrt() + 1  # above ||g_w||
    p, v = radius, torch.zeros_like(w)  # the cone's dual, p >= ||g_v||
    for _ in range(_ITERATIONS):
        gw, gv = _times(gram, w, v)
        inside, inside_dual = _inside(s, _dot(w, gw)), _inside(p, _dot(v, gv))
        product = s * p + _dot(v, gw)
        gap = (_dot(w, z) + product) / (num_strata + 1)
        gap = (_CENTRING * gap).clamp_min(_FLOOR)
        # The scaling point (c, g_u), and h such that h (2 J u u^T J - J) maps (s, w) to (p, v).
        x, y = inside.rsqrt(), inside_dual.rsqrt()
        half = (2 + 2 * product * x * y).clamp_min(4).sqrt()
        c, u = (s * x + p * y) / half, (w * x - v * y) / half
        h, turn, gu = x / y, 2 * c.square() - 1, (gw * x - gv * y) / half
        lift = gap * s / inside - radius
        outer = gu.unsqueeze(-1) * gu.unsqueeze(-2) * (2 / turn).unsqueeze(-1)
        matrix = h.unsqueeze(-1) * (gram - outer) + torch.diag_embed(z / w)
        target = gap / w
        right = target - linear - gap / inside * gw + 2 * c / turn * lift * gu
        solved, _ = torch.linalg.solve_ex(matrix, torch.stack([torch.ones_like(w), right], dim=-1))
        ones, free = solved.unbind(-1)
        dw = free - free.sum(-1, keepdim=True) / ones.sum(-1, keepdim=True) * ones
        along = _dot(gu, dw)
        ds = (lift / h + 2 * c * along) / turn
        dz = target - z - (z / w) * dw
        dp = radius - p
        dv = -gap / inside * w - v - h * (2 * u * (along - c * ds) + dw)
        shrink = torch.cat([-dw / w, -dz / z], dim=-1).amax(-1, keepdim=True)
        gdw, gdv = _times(gram, dw, dv)
        cone = _shrink(inside, s * ds - _dot(gw, dw), ds.square() - _dot(dw, gdw))
        dual = _shrink(inside_dual, p * dp - _dot(gv, dv), dp.square() - _dot(dv, gdv))
        shrink = torch.maximum(shrink, torch.maximum(cone, dual))
        step = _TO_BOUNDARY / shrink.clamp_min(_TO_BOUNDARY)
        w, z, s = w + step * dw, z + step * dz, s + step * ds
        p, v = p + step * dp, v + step * dv
    return -v


def _times(gram: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    both = gram @ torch.stack([a, b], dim=-1)
    return both[..., 0], both[..., 1]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _inside(height: Tensor, square: Tensor) -> Tensor:
    """Return ``height^2 - square``, above 0 inside the cone."""
    return torch.maximum(height.square() - square, _INSIDE * height.square())


def _shrink(inside: Tensor, slope: Tensor, curve: Tensor) -> Tensor:
    """Return 1 / t at the least t > 0 with ``inside + 2 t slope + t^2 curve = 0``; <= 0 if none."""
    return ((slope.square() - curve * inside).clamp_min(0).sqrt() - slope) / inside
