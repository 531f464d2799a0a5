"""The contract of ``stratum_solve`` in plain PyTorch: the rules' definitions, batched, float64.

Rules see the Gram of the K present strata only. What each rule means, and its source, is said by
its class in ``pinet_fast.rules``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._registry import Backend
from ._cone import support
from ._simplex import minimise
from ._spectrum import spectrum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny
_NOISE = 1e-8  # balanced: norms below this share of the largest are rounding, not a direction
_NO_SUM = 1e-10  # imtlg: a sum of weights below this share of their size cannot scale them to one
_LEAST_RADIUS = 1e-7  # cagrad: against the largest norm; a ball without inside has no solution path


def _agreement(gram: Tensor) -> Tensor:
    square = gram.diagonal(dim1=-2, dim2=-1)
    # A stratum that leaves a parameter untouched has no direction: its cosines are 0.
    norm = square.clamp_min(0).sqrt()
    inverse = torch.where(norm > 0, 1 / norm.clamp_min(_TINY), 0.0)
    cosines = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    keep = gram.sum(-1) * inverse > 0  # the sign of cos(m, g_k)
    keep = keep | ~keep.any(-1, keepdim=True)
    agreement = (cosines * keep.unsqueeze(-2).to(gram.dtype)).sum(-1)
    return torch.softmax(agreement.masked_fill(~keep, -torch.inf), dim=-1)


def _balanced(gram: Tensor) -> Tensor:
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    seen = norm > _NOISE * norm.amax(-1, keepdim=True).clamp_min(_TINY)
    count = seen.sum(-1, keepdim=True).clamp_min(1)
    mean = norm.masked_fill(~seen, 0.0).sum(-1, keepdim=True) / count
    balanced = (mean / norm.clamp_min(_TINY) / count).masked_fill(~seen, 0.0)
    nobody = norm.amax(-1, keepdim=True) <= 0
    return torch.where(nobody, 1 / gram.shape[-1], balanced)


def _mgda(gram: Tensor) -> Tensor:
    if gram.shape[-1] != 2:
        size = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(_TINY)
        return minimise(gram / size[..., None, None])
    first, both, second = gram[..., 0, 0], gram[..., 0, 1], gram[..., 1, 1]
    apart = first + second - 2 * both  # ||g_0 - g_1||^2
    equal = apart <= torch.finfo(gram.dtype).eps * (first + second)
    share = ((second - both) / apart.masked_fill(equal, 1.0)).clamp(0, 1)
    share = share.masked_fill(equal, 0.5)
    return torch.stack([share, 1 - share], dim=-1)


def _pcgrad(gram: Tensor, keys: Tensor | None) -> Tensor:
    num_strata = gram.shape[-1]
    square = gram.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(square > 0, 1 / square.clamp_min(_TINY), 0.0)
    if keys is None:
        inverse_norm = inverse.sqrt()
        keys = gram * inverse_norm.unsqueeze(-1) * inverse_norm.unsqueeze(-2)
    itself = torch.eye(num_strata, dtype=torch.bool, device=gram.device)
    # For every stratum the others in turn, itself last: int64 [..., K, K].
    order = keys.masked_fill(itself, torch.inf).argsort(dim=-1, stable=True).expand(gram.shape)
    inverse = inverse.unsqueeze(-2).expand_as(gram)
    # Row i holds the projected gradient of stratum i, as coefficients of the given ones.
    rows = torch.eye(num_strata, dtype=gram.dtype, device=gram.device).expand_as(gram)
    for turn in range(num_strata - 1):
        other = order[..., turn : turn + 1]
        conflict = (rows @ gram).gather(-1, other)
        excess = conflict * inverse.gather(-1, other)
        rows = rows.scatter_add(-1, other, -torch.where(conflict < 0, excess, conflict * 0))
    return rows.mean(-2)


def _imtlg(gram: Tensor) -> Tensor:
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norm > 0, 1 / norm.clamp_min(_TINY), 0.0)
    relative = inverse * norm.amax(-1, keepdim=True)  # of order one, whatever the loss scale
    cosines = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    solved = spectrum(cosines).power(-1).sum(-1) * relative
    total = solved.sum(-1, keepdim=True)
    mean = total.abs() <= _NO_SUM * solved.abs().sum(-1, keepdim=True)
    return torch.where(mean, 1 / gram.shape[-1], solved / total.masked_fill(mean, 1.0))


def _alignedmtl(gram: Tensor) -> Tensor:
    size = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    found = spectrum(gram / size.clamp_min(_TINY).unsqueeze(-1))
    smallest = found.values.masked_fill(~found.kept, torch.inf).amin(-1, keepdim=True)
    nothing = ~found.kept.any(-1, keepdim=True)  # all gradients are zero
    root = smallest.masked_fill(nothing, 0.0).sqrt()
    return torch.where(nothing, 1 / gram.shape[-1], root * found.power(-0.5).mean(-1))


def _cagrad(gram: Tensor, c: float) -> Tensor:
    mean = torch.full_like(gram[..., 0], 1 / gram.shape[-1])
    if c == 0:
        return mean
    size = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(_TINY)
    scaled = gram / size[..., None, None]
    with_mean = scaled.mean(-1)  # <g_s, g_0>
    radius = c * with_mean.mean(-1, keepdim=True).clamp_min(0).sqrt()
    return (mean + support(scaled, with_mean, radius.clamp_min(_LEAST_RADIUS))) / (1 + c)


_SIMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "agreement": _agreement,
    "balanced": _balanced,
    "mgda": _mgda,
    "imtlg": _imtlg,
    "alignedmtl": _alignedmtl,
}


def stratum_solve_reference(
    gram: Tensor, rule: str, kept: Sequence[int], c: float, keys: Tensor | None, out: Tensor
) -> None:
    """Write the weights of every Gram.

    Args:
        gram: [P, S, S] float64.
        rule: One of ``RULES``.
        kept: The K strata that are present, ascending, known on the host.
        c: Radius of ``cagrad``.
        keys: [S, S] float64, or None: the order of ``pcgrad``.
        out: [P, S] float64, fully written: 0 for absent strata.
    """
    is_whole = len(kept) == gram.shape[-1]
    index = None if is_whole else torch.tensor(kept, device=gram.device)
    if index is not None:
        gram = gram.index_select(-1, index).index_select(-2, index)
        keys = None if keys is None else keys.index_select(-1, index).index_select(-2, index)
    if rule == "pcgrad":
        weights = _pcgrad(gram, keys)
    elif rule == "cagrad":
        weights = _cagrad(gram, c)
    else:
        weights = _SIMPLE[rule](gram)
    is_finite = gram.isfinite().all(-1).all(-1, keepdim=True)
    weights = weights.masked_fill(~is_finite, torch.nan)
    if index is None:
        out.copy_(weights)
    else:
        out.zero_().index_copy_(-1, index, weights)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda gram, rule: None,
    impl=stratum_solve_reference,
)
