"""The contract of ``stratified_embedding`` in plain PyTorch: any device, any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.errors import InputError

from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_MAX_ROWS_AN_ID = 16
"""Up to so many rows of the table for every id, marking rows is faster than sorting ids."""

_DIGIT = 1 << 16
"""What is sorted at once on a CPU."""


def stratified_embedding_reduce_reference(
    ids: Sequence[Tensor],
    strata: Sequence[Tensor],
    grads: Sequence[Tensor],
    num_strata: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows [U], values [S, U, ...] and touched [S, U].

    Args:
        ids: K >= 1 tensors int64 [N_k] in ``0..num_rows-1``.
        strata: K tensors int64 [N_k] in ``0..num_strata-1``.
        grads: K tensors [N_k, ...] of one floating dtype, any strides.
        num_strata: S.
        num_rows: V.
    """
    check_ranges(ids, strata, num_strata, num_rows)
    rows, place = _place_of_touched(ids, strata, num_rows)
    cells = num_strata, rows.numel()
    values, touched = _sum_wide(place, grads, cells)
    return rows, values.to(grads[0].dtype), touched


def stratified_embedding_add_reference(
    dense: Tensor, ids: Sequence[Tensor], strata: Sequence[Tensor], grads: Sequence[Tensor]
) -> None:
    """Add the same sums to ``dense`` [S, V, ...], and nothing to what was not touched."""
    if not grads:
        return
    num_strata, num_rows = dense.shape[:2]
    check_ranges(ids, strata, num_strata, num_rows)
    if num_strata * num_rows <= sum(map(len, ids)):
        # All rows: to find those that are touched costs more than to add them all.
        place = torch.cat(list(strata)) * num_rows + torch.cat(list(ids))
        values, touched = _sum_wide(place, grads, (num_strata, num_rows))
        added = (dense.to(values.dtype) + values).to(dense.dtype)
        is_touched = touched.view(num_strata, num_rows, *[1] * (dense.dim() - 2))
        dense.copy_(torch.where(is_touched, added, dense))
        return
    rows, place = _place_of_touched(ids, strata, num_rows)
    values, touched = _sum_wide(place, grads, (num_strata, rows.numel()))
    stratum, position = touched.nonzero(as_tuple=True)
    cell = (stratum, rows[position])
    held = dense[cell].to(values.dtype)
    dense[cell] = (held + values[stratum, position]).to(dense.dtype)


def check_ranges(
    ids: Sequence[Tensor], strata: Sequence[Tensor], num_strata: int, num_rows: int
) -> None:
    """Raise an InputError that names the first entry out of range, if there is one."""
    for name, tensors, bound, what in (
        ("ids", ids, num_rows, "rows of the table"),
        ("strata", strata, num_strata, "strata"),
    ):
        for k, tensor in enumerate(tensors):
            if tensor.numel() == 0:
                continue
            low, high = torch.stack(torch.aminmax(tensor)).tolist()
            if low < 0 or high >= bound:
                outside = (tensor < 0) | (tensor >= bound)
                n = int(outside.nonzero()[0])
                raise InputError(
                    f"stratified_embedding: {name}[{k}][{n}]: expected 0..{bound - 1}, got "
                    f"{int(tensor[n])}; there are {bound} {what}"
                )


def _sum_wide(
    place: Tensor, grads: Sequence[Tensor], cells: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the sums by cell in float32 at least, [S, U, ...], and which were touched, [S, U].

    Args:
        place: int64 [N], the cell of every entry of all lists, counted row by row.
        grads: K tensors [N_k, ...].
        cells: S and U.
    """
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    entries = grads[0] if len(grads) == 1 else torch.cat(list(grads))
    entries, num_cells = entries.to(wide), cells[0] * cells[1]
    if entries.device.type == "cpu" and entries.numel() > 0:
        # A bag of entries for every cell, added one by one in their order.
        rows = entries.reshape(len(entries), -1).contiguous()
        counts = torch.bincount(place, minlength=num_cells)
        starts = counts.cumsum(0) - counts
        values = torch.embedding_bag(rows, _stable_order(place, num_cells), starts)[0]
        touched = counts > 0
    else:  # sorts, so no atomics
        values = entries.new_zeros((num_cells, *entries.shape[1:]))
        values.index_put_((place,), entries, accumulate=True)
        touched = torch.zeros(num_cells, dtype=torch.bool, device=place.device)
        touched.index_fill_(0, place, True)
    return values.view(*cells, *entries.shape[1:]), touched.view(cells)


def _stable_order(place: Tensor, num_cells: int) -> Tensor:
    """Return the stable permutation that sorts int64 [N] in ``0..num_cells-1``, on a CPU.

    Sixteen bits at a time, which NumPy sorts by radix: a fifth of the time of torch's sort.
    """
    import numpy as np

    digits = place.numpy()
    order = np.argsort(digits.astype(np.uint16), kind="stable")
    while num_cells > _DIGIT:
        digits, num_cells = digits >> 16, -(-num_cells // _DIGIT)
        order = order[np.argsort(digits[order].astype(np.uint16), kind="stable")]
    return torch.from_numpy(order)


def _place_of_touched(
    ids: Sequence[Tensor], strata: Sequence[Tensor], num_rows: int
) -> tuple[Tensor, Tensor]:
    """Return the distinct ids, ascending, int64 [U], and the cell [S, U] of every entry, [N]."""
    items = torch.cat(list(ids))
    if num_rows > _MAX_ROWS_AN_ID * items.numel():
        rows, position = torch.unique(items, return_inverse=True)
    else:
        marks = torch.bincount(items, minlength=num_rows) > 0
        rows, position = marks.nonzero().squeeze(1), (marks.cumsum(0) - 1).index_select(0, items)
    return rows, torch.cat(list(strata)) * rows.numel() + position


REDUCE = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda like: None,
    impl=stratified_embedding_reduce_reference,
)
ADD = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda like: None,
    impl=stratified_embedding_add_reference,
)
