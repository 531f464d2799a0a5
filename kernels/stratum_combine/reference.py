"""The contract of ``stratum_combine`` in plain PyTorch: any device, any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ALIGNMENT = 64
"""Bytes; that of every tensor of torch's own."""


def stratum_combine_reference(
    grads: Sequence[Tensor],
    weights: Tensor,
    outs: Sequence[Tensor],
    scale: Tensor | None,
    accumulate: Sequence[bool],
    rows: Sequence[Tensor | None],
) -> None:
    """Write or add ``sum_s weights[p, s] * scale * grads[p][s]`` to ``outs[p]``.

    Args:
        grads: P tensors [S, ...], or [S, U, ...] with ``rows``.
        weights: [P, S] float64.
        outs: P tensors [...], or [V, ...] with ``rows``; fully written, or added to.
        scale: float64 [], or None for one.
        accumulate: P choices: add.
        rows: int64 [U], or None, of every parameter.
    """
    if scale is not None:
        weights = torch.where(weights == 0, 0.0, weights * scale)
    if weights.device.type == "cpu":
        _by_weights(grads, weights, outs, accumulate, rows)
    else:
        by_masks(grads, weights, outs, accumulate, rows)


def _by_weights(
    grads: Sequence[Tensor],
    weights: Tensor,
    outs: Sequence[Tensor],
    accumulate: Sequence[bool],
    rows: Sequence[Tensor | None],
) -> None:
    """Combine on a CPU, where weights may be looked at: strata without weight are left out."""
    exact = weights.tolist()
    # What is 0 or infinite only in float32 is a weight, and a product with it is no error.
    of_dtype = {torch.float64: weights.unbind(0), torch.float32: weights.float().unbind(0)}
    for p, (grad, out, touched) in enumerate(zip(grads, outs, rows, strict=True)):
        if not any(exact[p]):
            if not accumulate[p]:
                out.zero_()
            continue
        wide = _wide(grad.dtype, out.dtype)
        is_sum = touched is None and not accumulate[p] and out.dtype is wide and _is_plain(out)
        total = out if is_sum else grad.new_empty(grad.shape[1:], dtype=wide)
        factors = of_dtype[wide][p]
        if 0 not in exact[p]:
            parts = grad.to(wide)
            if not _is_plain(parts):
                parts = parts.clone(memory_format=torch.contiguous_format)
            torch.mv(parts.view(len(factors), total.numel()).t(), factors, out=total.view(-1))
        else:
            _add_up(grad, exact[p], factors.tolist(), total)
        if is_sum:
            continue
        if touched is None:
            out.copy_(out.to(wide).add_(total) if accumulate[p] else total)
        elif accumulate[p]:
            out.index_copy_(0, touched, (out.index_select(0, touched) + total).to(out.dtype))
        else:
            out.zero_().index_copy_(0, touched, total.to(out.dtype))


def _is_plain(x: Tensor) -> bool:
    """Tell whether a tensor lies as torch's own do: the last bits of a product depend on that."""
    return x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0


def _add_up(grad: Tensor, exact: Sequence[float], factors: Sequence[float], total: Tensor) -> None:
    """Write the sum into ``total`` part by part, those that have a weight."""
    terms = [
        (factor, part)
        for weight, factor, part in zip(exact, factors, grad.unbind(0), strict=True)
        if weight != 0
    ]
    factor, part = terms[0]
    torch.mul(part.to(total.dtype), factor, out=total)
    for factor, part in terms[1:]:
        total.add_(part.to(total.dtype), alpha=factor)


def _wide(of_gradient: torch.dtype, of_output: torch.dtype) -> torch.dtype:
    """Return the dtype that holds both, float32 at least."""
    if of_gradient is of_output and of_output in (torch.float32, torch.float64):
        return of_output
    return torch.promote_types(torch.promote_types(of_gradient, of_output), torch.float32)


def by_masks(
    grads: Sequence[Tensor],
    weights: Tensor,
    outs: Sequence[Tensor],
    accumulate: Sequence[bool],
    rows: Sequence[Tensor | None],
) -> None:
    """Combine on any device, in float64; reads no value on the host.

    Args:
        grads: P tensors [S, ...], or [S, U, ...] with ``rows``.
        weights: [P, S] float64.
        outs: P tensors [...], or [V, ...] with ``rows``; fully written, or added to.
        accumulate: P choices: add.
        rows: int64 [U], or None, of every parameter.
    """
    for grad, row, out, add, touched in zip(grads, weights, outs, accumulate, rows, strict=True):
        total = torch.zeros(grad.shape[1:], dtype=torch.float64, device=out.device)
        for weight, part in zip(row, grad, strict=True):
            # A stratum without weight must not show, whatever it holds: 0 * NaN would.
            total += torch.where(weight == 0, 0.0, weight * part.double())
        if touched is not None:
            full = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
            total = full.index_copy_(0, touched, total)
        out.copy_(out.double() + total if add else total)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grads, outs: None,
    impl=stratum_combine_reference,
)
