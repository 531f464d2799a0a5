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
    right = torch.ones((*w.shape, 2), dtype=w.dtype, device=w.device)
    for _ in range(_ITERATIONS):
        gap = ((w * z).mean(-1, keepdim=True) * _CENTRING).clamp_min(_FLOOR)
        target, slope = gap / w, z / w
        right[..., 1] = target - (gram @ w.unsqueeze(-1)).squeeze(-1)
        matrix = gram.clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(slope)
        ones, free = torch.linalg.solve_ex(matrix, right)[0].unbind(-1)
        # `free` is the step that ignores sum(w) = 1; `level` is the multiplier of that constraint.
        level = free.sum(-1, keepdim=True) / ones.sum(-1, keepdim=True)
        dw = torch.addcmul(free, level, ones, value=-1)
        dz = torch.addcmul(target - z, slope, dw, value=-1)
        shrink = -torch.minimum(dw / w, dz / z).amin(-1, keepdim=True)
        step = _TO_BOUNDARY / shrink.clamp_min(_TO_BOUNDARY)
        w, z = torch.addcmul(w, step, dw), torch.addcmul(z, step, dz)
    return w / w.sum(-1, keepdim=True)
