"""The shortest point of a simplex: by its support where that is clear, else by iterations."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_ITERATIONS = 20
_CENTRING = 0.1  # each iteration aims at this share of the complementarity gap
_TO_BOUNDARY = 0.95  # share of the way to the boundary that a step may go
_FLOOR = 1e-12  # the gap at which iterates stay, so that no division degenerates

_LEAST_EIGENVALUE = 1e-6  # against the largest; below, weights are nearly undecided
_CLEAR = 1e-3  # a weight or a dual above this is positive, for the iterations to 1e-9


def minimise(gram: Tensor) -> Tensor:
    """Minimise ``w^T G w`` over the simplex.

    A primal-dual interior-point method: no branches on values where a device would have to be
    waited for, batched, and the strata's order does not matter. Where several points are minimal it
    goes to the middle of them, so that equal gradients weigh alike. On a CPU its operations are
    NumPy's, which cost a third of torch's, and for one Gram those of vectors, a half again. That is
    first tried by a guess of its support, which costs a tenth; weights differ by what the
    iterations leave open.

    Args:
        gram: [..., K, K], of order one.

    Source:
        Nocedal and Wright, Numerical Optimization (2006), section 16.6, with the equality
        constraint eliminated.
    """
    return on_host(gram) if gram.device.type == "cpu" else on_device(gram)


def on_device(gram: Tensor) -> Tensor:
    """Do so by torch, which waits for no value."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    weights: Tensor = _iterate(torch, gram, identity, _solve)
    return weights


def on_host(gram: Tensor) -> Tensor:
    """Do so by NumPy."""
    import numpy as np

    numbers = gram.detach().numpy()
    num_strata = numbers.shape[-1]
    with np.errstate(all="ignore"):  # what is not finite is NaN in the end
        if numbers.size == num_strata**2:
            one = numbers.reshape(num_strata, num_strata)
            with suppress(np.linalg.LinAlgError):  # a singular one goes the way of the others
                weights = _by_support(one)
                if weights is None:
                    weights = _iterate_one(one)
                return torch.from_numpy(weights.reshape(numbers.shape[:-1]))
        return torch.from_numpy(_iterate(np, numbers, np.eye(num_strata), _solve_on_host))


def _by_support(gram: Any) -> Any | None:
    """Return the weights of one Gram [K, K] that meet the conditions of the minimum, or None.

    The support is guessed: strata whose weight is not positive without the bounds are left out,
    until all weights are. The result is looked at, so that a wrong guess is no wrong answer.
    """
    import numpy as np

    values = np.linalg.eigvalsh(gram)
    if not values[0] > _LEAST_EIGENVALUE * values[-1]:
        return None
    kept = np.arange(len(gram))
    while True:
        shares = np.linalg.solve(gram[kept][:, kept], np.ones(len(kept)))
        is_kept = shares > 0  # some are: their sum is a square of a norm that is not 0
        if is_kept.all():
            break
        kept = kept[is_kept]
    weights = np.zeros(len(gram))
    weights[kept] = shares / shares.sum()
    duals = gram @ weights
    duals -= weights @ duals
    return weights if ((weights > _CLEAR) | (duals > _CLEAR)).all() else None


def _solve_on_host(matrix: Any, right: Any) -> Any:
    import numpy as np

    try:
        return np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError:  # one of the batch: torch solves the others
        return _solve(torch.from_numpy(matrix), torch.from_numpy(right)).numpy()


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve_ex(matrix, right)[0]  # looks at nothing on the host
    return solution


def _iterate(xp: Any, gram: Any, identity: Any, solve: Callable[[Any, Any], Any]) -> Any:
    """Return the weights [..., K]; ``xp`` is torch or NumPy, and what follows are its arrays."""
    w = xp.full_like(gram[..., 0], 1 / gram.shape[-1])
    gradient = gram.mean(-1)
    z = gradient - xp.amin(gradient, -1)[..., None] + 1  # duals of w >= 0
    one = xp.ones_like(w)
    for _ in range(_ITERATIONS):
        gap = xp.clip((w * z).mean(-1)[..., None] * _CENTRING, _FLOOR, None)
        target, slope = gap / w, z / w
        right = xp.stack([one, target - (gram @ w[..., None])[..., 0]], -1)
        solved = solve(gram + slope[..., None] * identity, right)
        ones, free = solved[..., 0], solved[..., 1]
        # `free` is the step that ignores sum(w) = 1; `level` is the multiplier of that constraint.
        level = (free.sum(-1) / ones.sum(-1))[..., None]
        dw = free - level * ones
        dz = target - z - slope * dw
        shrink = -xp.amin(xp.minimum(dw / w, dz / z), -1)[..., None]
        step = _TO_BOUNDARY / xp.clip(shrink, _TO_BOUNDARY, None)
        w, z = w + step * dw, z + step * dz
    return w / w.sum(-1)[..., None]


def _iterate_one(gram: Any) -> Any:
    """Do what ``_iterate`` does for one Gram [K, K]: NumPy's functions for any shape cost twice."""
    import numpy as np

    num_strata = len(gram)
    w = np.full(num_strata, 1 / num_strata)
    gradient = gram.mean(-1)
    z = gradient - gradient.min() + 1
    right = np.ones((num_strata, 2))
    matrix = np.empty_like(gram, order="C")
    diagonal = matrix.reshape(-1)[:: num_strata + 1]
    total, least = np.add.reduce, np.minimum.reduce
    for _ in range(_ITERATIONS):
        gap = max(w.dot(z) / num_strata * _CENTRING, _FLOOR)
        target, slope = gap / w, z / w
        matrix[:] = gram
        diagonal += slope
        right[:, 1] = target - gram.dot(w)
        ones, free = np.linalg.solve(matrix, right).T
        dw = free - total(free) / total(ones) * ones
        dz = target - z - slope * dw
        shrink = -min(least(dw / w), least(dz / z))
        step = _TO_BOUNDARY / max(shrink, _TO_BOUNDARY)
        w += step * dw
        z += step * dz
    return w / total(w)
