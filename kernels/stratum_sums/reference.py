"""The contract of ``stratum_sums`` in plain PyTorch: any device, any dtype, float64."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_RUN = 32
"""Rows that are summed in their own dtype on a CPU; all above is summed in float64."""

_MAX_ELEMENTS = 1 << 24
"""Elements that are held at once elsewhere."""


def stratum_sums_reference(rows: Tensor, ids: Tensor, out: Tensor) -> None:
    """Write ``out[s] = sum of the rows of stratum s``; no value of a GPU is read on the host.

    Args:
        rows: [N, D] of any floating dtype and strides.
        ids: int64 [N] in ``0..S-1``.
        out: [S, D] of any floating dtype, fully written.
    """
    if rows.device.type == "cpu":
        order, row_offsets = _sorted(ids, out.shape[0])
        slice_sums(rows, row_offsets, order, out)
    else:
        masked_sums(rows, ids, out)


def masked_sums(rows: Tensor, ids: Tensor, out: Tensor) -> None:
    """Write the sums on any device, by S passes over the rows; reads no value on the host.

    Args:
        rows: [N, D] of any floating dtype and strides.
        ids: int64 [N]; rows of ids out of ``0..S-1`` count nowhere.
        out: [S, D] of any floating dtype, fully written.
    """
    height = max(_MAX_ELEMENTS // max(rows.shape[1], 1), 1)
    for s in range(out.shape[0]):
        total = torch.zeros(out.shape[1:], dtype=torch.float64, device=out.device)
        for start in range(0, rows.shape[0], height):
            part, where = rows[start : start + height], ids[start : start + height]
            # Not a product with a mask or a matrix: 0 * NaN would spread to other strata.
            total += torch.where((where == s).unsqueeze(1), part.double(), 0.0).sum(0)
        out[s].copy_(total)


def slice_sums(rows: Tensor, row_offsets: Sequence[int], order: Tensor | None, out: Tensor) -> None:
    """Write the sums of consecutive rows on a CPU, in two passes of torch whatever S is.

    Every bag of ``embedding_bag`` is added row by row, by one thread and without a mask: the bits
    do not depend on the number of threads, and a NaN stays in its stratum.

    Args:
        rows: [N, D] of any floating dtype and strides.
        row_offsets: S + 1 ints, ascending, in ``0..N``.
        order: Which row each place holds, int64 [N]; None for the rows as they are.
        out: [S, D] of any floating dtype, fully written.
    """
    first, last = row_offsets[0], row_offsets[-1]
    if first == last or rows.shape[1] == 0:
        out.zero_()
        return
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
    spans = list(itertools.pairwise(row_offsets))
    places = torch.arange(first, last) if order is None else order[first:last]
    starts = torch.cat([torch.arange(a - first, b - first, _RUN) for a, b in spans])
    runs = torch.embedding_bag(rows, places, starts)[0].double()
    counts = (-((a - b) // _RUN) for a, b in spans[:-1])  # rounded up
    firsts = torch.tensor(list(itertools.accumulate(counts, initial=0)))
    out.copy_(torch.embedding_bag(runs, torch.arange(runs.shape[0]), firsts)[0])


def _sorted(ids: Tensor, num_strata: int) -> tuple[Tensor | None, list[int]]:
    """Return the stable order that sorts the ids, None if they are sorted, and where strata start.

    Ids out of range come before the first stratum or after the last.
    """
    order = None
    ids = ids.contiguous()
    if bool((ids[1:] < ids[:-1]).any()):
        ids, order = ids.sort(stable=True)
    return order, torch.searchsorted(ids, torch.arange(num_strata + 1)).tolist()


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda rows, ids, num_strata: None,
    impl=stratum_sums_reference,
)
