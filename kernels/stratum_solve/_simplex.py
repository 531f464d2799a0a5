"""The shortest point of a simplex, in a fixed number of tensor operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_ITERATIONS = 20
_CENTRING = 0.1  # each iteration aims at this share of the complementarity gap
_TO_BOUNDARY = 0.95  # share of the way to the boundary that a step may go
_FLOOR = 1e-12  # the gap at which iterates stay, so that no division degenerates


def minimise(gram: Tensor) -> Tensor:
    """Minimise ``w^T G w`` over the simplex.

    A primal-dual interior-point method: no branches on values, hence no host sync, batched, and
    the strata's order does not matter. Where several points are minimal it goes to the middle of
    them, so that equal gradients weigh alike.

    Args:
        gram: [..., K, K], of order one.

    Source:
        Nocedal and Wright, Numerical Optimization (2006), section 16.6, with the equality
        constraint eliminated.
    """
    w = torch.full_like(gram[..., 0], 1 / gram.shape[-1])
    gradient = gram.mean(-1)
    z = gradient - gradient.amin(-1, keepdim=True) + 1  # duals of w >= 0
    for _ in range(_ITERATIONS):
        gap = (_CENTRING * (w * z).mean(-1, keepdim=True)).clamp_min(_FLOOR)
        target = gap / w
        gradient = (gram @ w.unsqueeze(-1)).squeeze(-1)
        right = torch.stack([torch.ones_like(w), target - gradient], dim=-1)
        solved, _ = torch.linalg.solve_ex(gram + torch.diag_embed(z / w), right)
        ones, free = solved.unbind(-1)
        level = free.sum(-1, keepdim=True) / ones.sum(-1, keepdim=True)
        # `free` is the step that ignores sum(w) = 1; `level` is the multiplier of that constraint.
        dw = free - level * ones
        dz = target - z - (z / w) * dw
        shrink = torch.cat([-dw / w, -dz / z], dim=-1).amax(-1, keepdim=True)
        step = _TO_BOUNDARY / shrink.clamp_min(_TO_BOUNDARY)
        w, z = w + step * dw, z + step * dz
    return w / w.sum(-1, keepdim=True)
