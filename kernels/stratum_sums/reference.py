"""The contract of ``stratum_sums`` in plain PyTorch: any device, any dtype, float64."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import torch

from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_RUN = 32
"""Rows that are summed in their own dtype on a CPU; all above is summed in float64."""

_WIDE = (torch.float32, torch.float64)

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
        slice_sums([(rows, None, out)], *slices(ids, out.shape[0]))
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


def slices(ids: Tensor, num_strata: int) -> tuple[list[int], Tensor | None]:
    """Return where strata start in the order of the ids, and that order, on a CPU.

    Args:
        ids: int64 [N]; those out of ``0..S-1`` come before the first stratum or after the last.
        num_strata: S.

    Returns:
        S + 1 ints; and the stable permutation that sorts the ids, int64 [N], None if they are
        sorted.
    """
    import numpy as np

    # By NumPy, whose small operations cost a third of torch's: every layer asks.
    order = None
    numbers = ids.numpy()
    if (numbers[1:] < numbers[:-1]).any():
        ids, order = ids.contiguous().sort(stable=True)
        numbers = ids.numpy()
    return np.searchsorted(numbers, np.arange(num_strata + 1)).tolist(), order


def slice_sums(
    sums: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    row_offsets: Sequence[int],
    order: Tensor | None,
) -> None:
    """Write sums of consecutive rows on a CPU, in a pass of torch each and one more, whatever S is.

    Every bag of ``embedding_bag`` is added row by row, by one thread and without a mask: the bits
    do not depend on the number of threads, and a NaN stays in its stratum.

    Args:
        sums: What is summed, at least one: rows [N, D] of any floating dtype and strides; factors
            of them, [N], of the rows' dtype and that float32 at least, or None for ones; and the
            sums, [S, D] of any floating dtype, fully written.
        row_offsets: S + 1 ints, ascending, in ``0..N``.
        order: Which row each place holds, int64 [N]; None for the rows as they are.
    """
    first, last = row_offsets[0], row_offsets[-1]
    if first == last or sums[0][0].shape[1] == 0:
        for _, _, out in sums:
            out.zero_()
        return
    places, starts, runs, firsts = _runs(tuple(row_offsets))
    if order is not None:
        places = order[first:last]
    parts = []
    for rows, factors, _ in sums:
        if rows.dtype not in _WIDE:
            rows = rows.float()
        if factors is not None:
            factors = factors[first:last] if order is None else factors.index_select(0, places)
        rows = rows.contiguous()
        parts.append(torch.embedding_bag(rows, places, starts, False, 0, False, factors)[0])
    if len(parts) == 1:  # most often, and then the rest costs as much as the call above
        sums[0][2].copy_(torch.embedding_bag(parts[0].double(), runs, firsts)[0])
        return
    found = torch.embedding_bag(torch.cat(parts, 1).double(), runs, firsts)[0]
    for (_, _, out), part in zip(sums, found.chunk(len(sums), 1), strict=True):
        out.copy_(part)


@functools.lru_cache(maxsize=8)
def _runs(row_offsets: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return places from first to last, which start a run, the runs, and strata's first ones.

    Every layer of a model asks for the same ones.
    """
    first = row_offsets[0]
    spans = list(itertools.pairwise(row_offsets))
    parts = [torch.arange(a - first, b - first, _RUN, device="cpu") for a, b in spans]
    firsts = list(itertools.accumulate((len(part) for part in parts), initial=0))
    places = torch.arange(first, row_offsets[-1], device="cpu")
    runs = torch.arange(firsts.pop(), device="cpu")
    return places, torch.cat(parts), runs, torch.tensor(firsts, device="cpu")


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda rows, ids, num_strata: None,
    impl=stratum_sums_reference,
)
