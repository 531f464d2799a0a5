"""The contract of ``stratum_gram`` in plain PyTorch: any device, any dtype."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import torch

from .._registry import Backend
from ..stratum_sums.reference import slice_sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_RUN = 128
"""Products that are summed in their own dtype on a CPU; their sums are summed as rows are."""

_SMALL = 1 << 14
"""Columns of a parameter that is joined with others."""

_ALIGNMENT = 64
"""Bytes; that of every tensor of torch's own."""

_MAX_PRODUCTS = 1 << 24
"""Products that are held at once elsewhere."""


def stratum_gram_reference(grads: Sequence[Tensor], out: Tensor) -> None:
    """Write ``out[p, s, t] = <grads[p][s], grads[p][t]>``.

    Args:
        grads: P tensors [S, ...] of any floating dtype and strides.
        out: [P, S, S] float64, fully written.
    """
    if out.device.type == "cpu":
        _by_runs(grads, out)
    else:
        by_products(grads, out)
        out.copy_(out.triu() + out.triu(1).mT)


@functools.lru_cache(maxsize=8)
def _upper(strata: int) -> Tensor:
    """Return where the upper triangle holds each entry of a symmetric [S, S], both flattened."""
    place = torch.arange(strata**2, device="cpu").view(strata, strata)
    return torch.minimum(place, place.mT).flatten()


def _by_runs(grads: Sequence[Tensor], out: Tensor) -> None:
    """Write the inner products on a CPU: matrix products of runs, which are then added."""
    strata = out.shape[1]
    flat = [_as_rows(grad, strata) for grad in grads]
    # Most parameters are small: a copy of all of these costs less than a product of each.
    groups: dict[torch.dtype | int, list[int]] = {}
    for p, rows in enumerate(flat):
        groups.setdefault(rows.dtype if rows.shape[1] <= _SMALL else p, []).append(p)
    for group in groups.values():
        rows = flat[group[0]]
        if len(group) > 1 or rows.shape[1] % _RUN or rows.data_ptr() % _ALIGNMENT:
            # The last bits of a matrix product depend on where its operands lie.
            rows = _in_whole_runs([flat[p] for p in group])
        blocks = rows.view(strata, rows.shape[1] // _RUN, _RUN).transpose(0, 1)
        products = torch.bmm(blocks, blocks.mT)
        sizes = (-(-flat[p].shape[1] // _RUN) for p in group)
        sums = out.new_empty((len(group), strata * strata))
        offsets = list(itertools.accumulate(sizes, initial=0))
        slice_sums([(products.flatten(1), None, sums)], offsets, None)
        symmetric = sums.index_select(1, _upper(strata)).view(-1, strata, strata)
        out.index_copy_(0, torch.tensor(group, device="cpu"), symmetric)


def _as_rows(grad: Tensor, strata: int) -> Tensor:
    """Return a gradient as [S, columns] in float32 at least, without gaps."""
    rows = grad.reshape(strata, grad.numel() // strata)
    if rows.dtype is not torch.float32 and rows.dtype is not torch.float64:
        rows = rows.float()
    return rows.contiguous()


def _in_whole_runs(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors [S, columns] beside each other, each with zeros up to whole runs."""
    zeros: dict[int, Tensor] = {}  # without gaps: with one that has some a join takes three times
    pieces: list[Tensor] = []
    for rows in parts:
        pieces.append(rows)
        missing = -rows.shape[1] % _RUN
        if missing and missing not in zeros:
            zeros[missing] = rows.new_zeros((rows.shape[0], missing))
        if missing:
            pieces.append(zeros[missing])
    return torch.cat(pieces, dim=1)


def by_products(grads: Sequence[Tensor], out: Tensor) -> None:
    """Write the inner products on any device, every product and sum in float64.

    Args:
        grads: P tensors [S, ...] of any floating dtype and strides.
        out: [P, S, S] float64, fully written.
    """
    strata = out.shape[1]
    width = max(_MAX_PRODUCTS // strata**2, 1)
    out.zero_()
    for grad, gram in zip(grads, out, strict=True):
        slices = grad.reshape(strata, grad.numel() // strata)
        for start in range(0, slices.shape[1], width):
            rows = slices[:, start : start + width].double()
            gram += (rows[:, None] * rows).sum(2)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grads: None,
    impl=stratum_gram_reference,
)
