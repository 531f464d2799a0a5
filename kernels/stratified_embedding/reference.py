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
    rows, values, touched = _sum_wide(ids, strata, grads, num_strata, num_rows)
    return rows, values.to(grads[0].dtype), touched


def stratified_embedding_add_reference(
    dense: Tensor, ids: Sequence[Tensor], strata: Sequence[Tensor], grads: Sequence[Tensor]
) -> None:
    """Add the same sums to ``dense`` [S, V, ...], and nothing to what was not touched."""
    if not grads:
        return
    num_strata, num_rows = dense.shape[:2]
    check_ranges(ids, strata, num_strata, num_rows)
    rows, values, touched = _sum_wide(ids, strata, grads, num_strata, num_rows)
    stratum, position = touched.nonzero(as_tuple=True)
    place = (stratum, rows[position])
    held = dense[place].to(values.dtype)
    dense[place] = (held + values[stratum, position]).to(dense.dtype)


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
    ids: Sequence[Tensor],
    strata: Sequence[Tensor],
    grads: Sequence[Tensor],
    num_strata: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, values in float32 at least, touched."""
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    row_shape = grads[0].shape[1:]
    rows, position = _distinct(torch.cat(list(ids)), num_rows)
    num_touched = rows.numel()
    place = torch.cat(list(strata)) * num_touched + position
    values = grads[0].new_zeros((num_strata * num_touched, *row_shape), dtype=wide)
    if values.device.type == "cpu":  # in the order of lists and entries
        for part, grad in zip(
            torch.split(place, [len(grad) for grad in grads]), grads, strict=True
        ):
            values.index_add_(0, part, grad.to(wide))
    else:  # sorts, so no atomics
        values.index_put_((place,), torch.cat(list(grads)).to(wide), accumulate=True)
    touched = torch.zeros(num_strata * num_touched, dtype=torch.bool, device=place.device)
    touched.index_fill_(0, place, True)
    return (
        rows,
        values.view(num_strata, num_touched, *row_shape),
        touched.view(num_strata, num_touched),
    )


def _distinct(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the distinct ids, ascending, and where among them each id is."""
    if num_rows > _MAX_ROWS_AN_ID * ids.numel():
        rows, position = torch.unique(ids, return_inverse=True)
        return rows, position
    marks = torch.zeros(num_rows, dtype=torch.int64, device=ids.device).index_fill_(0, ids, 1)
    return marks.nonzero().squeeze(1), (marks.cumsum(0) - 1).index_select(0, ids)


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
