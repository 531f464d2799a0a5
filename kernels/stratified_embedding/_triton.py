"""CUDA backend of ``stratified_embedding``.

Entries of all lists are sorted by cell, (row, stratum), stably, by torch on the device. A cell of
at most LONG entries is summed by one program in the order of the entries, a few cells at a time,
and written once. Longer ones, of popular items, would keep one program busy while others wait: the
sorted entries are cut into blocks of LONG, and such a cell reaches beyond the block it begins in.
So a block holds at most the rest of one long cell and the beginning of another: two slots, which
a second kernel adds from the first block of a cell to its last. Gradients are read where they are,
by a table of addresses. No atomics; only ``reduce`` waits for the device, to learn U.
"""

import torch
import triton
import triton.language as tl

from .. import _configs
from .._tl import is_interpreted, padded
from .reference import check_ranges

_TL_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _entry_pointers(entry, lists_ptr, num_lists, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Return where the gradients of entries (int64) begin; lists hold them one after the other."""
    address = tl.zeros_like(entry)
    for k in range(num_lists):
        first = tl.load(lists_ptr + 3 * k)
        base = tl.load(lists_ptr + 3 * k + 1)
        step = tl.load(lists_ptr + 3 * k + 2)  # bytes between entries
        address = tl.where(entry >= first, base + (entry - first) * step, address)
    pointers = address.to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        # Values from a table carry no alignment, and without it every load is a scalar one.
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit(do_not_specialize=["num_cells", "num_lists", "num_touched"])
def _cells_kernel(
    out_ptr,  # values [S, U, width], or dense [S, V, width]
    touched_ptr,  # [S, U] bool, not IS_ADD
    keys_ptr,  # [num_entries] sorted, IS_ADD
    begin_ptr,  # [num_cells] int64: first entry of every cell
    end_ptr,  # [num_cells] int64
    order_ptr,  # [num_entries] int64
    lists_ptr,  # [num_lists, 3] int64: first entry, address, bytes between entries
    num_cells,
    num_lists,
    num_touched,  # U, not IS_ADD
    width,
    stride_s,  # of dense, IS_ADD
    stride_v,
    S: tl.constexpr,
    CELLS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONG: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    IS_ADD: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # addresses and strides are multiples of 16 bytes
    REVERSE: tl.constexpr,  # tests run the programs in the opposite order
):
    """Sum the entries of cells that are not long, in their order.

    ``reduce``: cell u * S + s. ``add``: a cell is named by its first entry; the others are none.
    """
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    o_cell = pid.to(tl.int64) * CELLS + tl.arange(0, CELLS)
    m_cell = o_cell < num_cells
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < width
    begin = tl.load(begin_ptr + o_cell, mask=m_cell, other=0)
    count = tl.load(end_ptr + o_cell, mask=m_cell, other=0) - begin
    if IS_ADD:
        key = tl.load(keys_ptr + o_cell, mask=m_cell, other=-1).to(tl.int64)
        # Entries out of range have keys below zero: nobody waits to say so.
        m_cell = m_cell & (begin == o_cell) & (key >= 0)
        p_out = out_ptr + (key % S) * stride_s + (key // S) * stride_v
    else:
        u = o_cell // S
        place = (o_cell - u * S) * num_touched + u
        if tl.program_id(1) == 0:
            tl.store(touched_ptr + place, (count > 0).to(tl.int8), mask=m_cell)
        p_out = out_ptr + place * width
    m_cell = m_cell & (count <= LONG)
    m_out = m_cell[:, None] & m_c[None, :]
    p_out = p_out[:, None] + o_c[None, :]
    acc = tl.zeros([CELLS, COLUMNS], dtype=COMPUTE)
    for j in range(tl.max(tl.where(m_cell, count, 0), axis=0)):
        m_j = m_cell & (j < count)
        entry = tl.load(order_ptr + begin + j, mask=m_j, other=0)
        p_x = _entry_pointers(entry, lists_ptr, num_lists, DTYPE, IS_ALIGNED)
        p_x = p_x[:, None] + o_c[None, :]
        acc += tl.load(p_x, mask=m_j[:, None] & m_c[None, :], other=0.0).to(COMPUTE)
    if IS_ADD:
        acc += tl.load(p_out, mask=m_out, other=0.0).to(COMPUTE)
    tl.store(p_out, acc, mask=m_out)


@triton.jit
def _sum_entries(
    begin, end, o_c, m_c, order_ptr, lists_ptr, num_lists,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return the sum [COLUMNS] of the sorted entries from begin to end."""
    acc = tl.zeros([COLUMNS], dtype=COMPUTE)
    for row in range(begin, end, ROWS):
        o_n = row + tl.arange(0, ROWS)
        m_n = o_n < end
        entry = tl.load(order_ptr + o_n, mask=m_n, other=0)
        p_x = _entry_pointers(entry, lists_ptr, num_lists, DTYPE, IS_ALIGNED)
        p_x = p_x[:, None] + o_c[None, :]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_c[None, :], other=0.0).to(COMPUTE)
        acc += tl.sum(b_x, axis=0)
    return acc


@triton.jit(do_not_specialize=["num_entries", "num_lists"])
def _slots_kernel(
    slots_ptr,  # [num_blocks, 2, width] COMPUTE
    begin_ptr,  # [num_blocks] int64: where the cell of a block's last entry begins
    end_ptr,  # [num_blocks] int64: and where it ends
    order_ptr,
    lists_ptr,
    num_entries,
    num_lists,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONG: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """slots[b, 0]: the rest of the long cell before; slots[b, 1]: the one that begins here."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    block = pid.to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < width
    p_slots = slots_ptr + block * 2 * width + o_c
    here = block * LONG
    stop = tl.minimum(here + LONG, num_entries)
    before = tl.maximum(block - 1, 0)
    rest = tl.load(end_ptr + before)
    if (block > 0) & (rest > here) & (rest - tl.load(begin_ptr + before) > LONG):
        acc = _sum_entries(
            here, tl.minimum(rest, stop), o_c, m_c, order_ptr, lists_ptr, num_lists,
            ROWS, COLUMNS, DTYPE, COMPUTE, IS_ALIGNED,
        )  # fmt: skip
        tl.store(p_slots, acc, mask=m_c)
    begin = tl.load(begin_ptr + block)
    if (begin >= here) & (tl.load(end_ptr + block) - begin > LONG):
        acc = _sum_entries(
            begin, stop, o_c, m_c, order_ptr, lists_ptr, num_lists,
            ROWS, COLUMNS, DTYPE, COMPUTE, IS_ALIGNED,
        )  # fmt: skip
        tl.store(p_slots + width, acc, mask=m_c)


@triton.jit
def _long_cells_kernel(
    out_ptr,
    place_ptr,  # [num_blocks] int64: element of the output where that cell goes; below 0: nowhere
    slots_ptr,  # [num_blocks, 2, width] COMPUTE
    begin_ptr,  # [num_blocks] int64, as above
    end_ptr,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONG: tl.constexpr,
    COMPUTE: tl.constexpr,
    IS_ADD: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Add the slots of the long cell that begins in a block, if one does, in ascending order."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    block = pid.to(tl.int64)
    begin = tl.load(begin_ptr + block)
    end = tl.load(end_ptr + block)
    place = tl.load(place_ptr + block)
    if (begin >= block * LONG) & (end - begin > LONG) & (place >= 0):
        o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        m_c = o_c < width
        acc = tl.load(slots_ptr + (block * 2 + 1) * width + o_c, mask=m_c, other=0.0)
        last = (end - 1) // LONG
        for row in range(block + 1, last + 1, ROWS):
            o_b = row + tl.arange(0, ROWS)
            p_x = slots_ptr + o_b[:, None] * 2 * width + o_c[None, :]
            b_x = tl.load(p_x, mask=(o_b <= last)[:, None] & m_c[None, :], other=0.0)
            acc += tl.sum(b_x, axis=0)
        p_out = out_ptr + place + o_c
        if IS_ADD:
            acc += tl.load(p_out, mask=m_c, other=0.0).to(COMPUTE)
        tl.store(p_out, acc, mask=m_c)


class _Entries:
    """The entries of all lists, sorted by cell; there is at least one."""

    def __init__(self, ids, strata, grads, num_strata, num_rows):
        self.num_strata = num_strata
        self.width = grads[0].shape[1:].numel()
        self.dtype, self.device = grads[0].dtype, grads[0].device
        # Kept, because the device reads them by address.
        self.grads = [_inner_contiguous(grad.reshape(grad.shape[0], self.width)) for grad in grads]
        item, stratum = torch.cat(list(ids)), torch.cat(list(strata))
        bad = (item < 0) | (item >= num_rows) | (stratum < 0) | (stratum >= num_strata)
        key = torch.where(bad, -1, item * num_strata + stratum)
        if num_rows * num_strata < 2**31:
            key = key.int()  # half the passes of the sort
        self.keys, self.order = torch.sort(key, stable=True)
        table, first = [], 0
        for grad in self.grads:
            table.append((first, grad.data_ptr(), grad.stride(0) * grad.element_size()))
            first += grad.shape[0]
        self.count = first
        self.is_aligned = all(address % 16 == 0 and step % 16 == 0 for _, address, step in table)
        self.lists = torch.tensor(
            table, dtype=torch.int64, pin_memory=not is_interpreted()
        ).to(self.device, non_blocking=True)  # fmt: skip

    def stratum_and_row(self, keys):
        """Return the stratum and the row of cells, int64."""
        row = torch.div(keys.long(), self.num_strata, rounding_mode="floor")
        return keys.long() - row * self.num_strata, row

    def ends_of_blocks(self, long):
        """Return the cell that the last entry of every block is in: key, begin, end."""
        num_blocks = triton.cdiv(self.count, long)
        last = torch.arange(1, num_blocks + 1, device=self.device) * long - 1
        keys = self.keys[last.clamp_(max=self.count - 1)]
        begin = torch.searchsorted(self.keys, keys)
        return keys, begin, torch.searchsorted(self.keys, keys, right=True)


def _inner_contiguous(rows):
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def launch_options(width, dtype, is_aligned, config, reverse=False):
    """Return the compile-time arguments that all three kernels share, and those of each."""
    compute = tl.float64 if dtype is torch.float64 else tl.float32
    columns = min(padded(width), 128)
    cells = min(max(config["TILE_ELEMENTS"] // columns, 1), 256)
    shared = {"COLUMNS": columns, "LONG": config["LONG"], "COMPUTE": compute, "REVERSE": reverse}
    reading = {"DTYPE": _TL_DTYPE[dtype], "IS_ALIGNED": is_aligned}
    return {
        "cells": {**shared, **reading, "CELLS": cells},
        "slots": {**shared, **reading, "ROWS": min(cells, config["LONG"])},
        "long": {**shared, "ROWS": config["FOLD_ROWS"]},
    }


def _config(entries):
    dtype = str(entries.dtype).removeprefix("torch.")
    return _configs.lookup("stratified_embedding", entries.device, dtype, "all")


def _launch(entries, cells, long, out, touched, num_touched, strides, reverse):
    """Launch the kernels; ``cells``: begin and end of each; ``long``: place, begin, end of each."""
    config, is_add = _config(entries), touched is None
    options = launch_options(entries.width, entries.dtype, entries.is_aligned, config, reverse)
    columns = max(triton.cdiv(entries.width, options["cells"]["COLUMNS"]), 1)
    reading = (entries.order, entries.lists)
    _cells_kernel[(triton.cdiv(len(cells[0]), options["cells"]["CELLS"]), columns)](
        out, touched, entries.keys if is_add else None, *cells, *reading, len(cells[0]),
        len(entries.grads), num_touched, entries.width, *strides, S=entries.num_strata,
        IS_ADD=is_add, **options["cells"], num_warps=config["num_warps"],
    )  # fmt: skip
    if long is None or entries.width == 0:
        return
    place, begin, end = long
    compute = torch.float64 if entries.dtype is torch.float64 else torch.float32
    slots = torch.empty((len(begin), 2, entries.width), dtype=compute, device=entries.device)
    _slots_kernel[(len(begin), columns)](
        slots, begin, end, *reading, entries.count, len(entries.grads), entries.width,
        **options["slots"], num_warps=config["num_warps"],
    )  # fmt: skip
    _long_cells_kernel[(len(begin), columns)](
        out, place, slots, begin, end, entries.width, IS_ADD=is_add, **options["long"],
        num_warps=config["num_warps"],
    )  # fmt: skip


def run_reduce(ids, strata, grads, num_strata, num_rows, reverse=False):
    """Return rows [U], values [S, U, ...] and touched [S, U]; arguments as of the reference."""
    device, shape = grads[0].device, grads[0].shape[1:]
    if sum(len(x) for x in ids) == 0:
        return (
            torch.empty(0, dtype=torch.int64, device=device),
            grads[0].new_empty((num_strata, 0, *shape)),
            torch.empty((num_strata, 0), dtype=torch.bool, device=device),
        )
    entries = _Entries(ids, strata, grads, num_strata, num_rows)
    row = entries.stratum_and_row(entries.keys)[1]
    begins = torch.ones_like(row, dtype=torch.bool)
    torch.ne(row[1:], row[:-1], out=begins[1:])
    # The only wait: for U, and for whether an entry is out of range, whose key is the lowest.
    num_touched, lowest = torch.stack([begins.sum(), row[0]]).tolist()
    if lowest < 0:
        check_ranges(ids, strata, num_strata, num_rows)
    # Equal numbers meet in one place, so their order does not matter.
    rows = row.new_empty(num_touched).scatter_(0, begins.cumsum(0) - 1, row)
    first = rows.unsqueeze(1) * num_strata + torch.arange(num_strata, device=device)
    first = torch.cat([first.view(-1), first[-1, -1:] + 1]).to(entries.keys.dtype)
    bounds = torch.searchsorted(entries.keys, first)
    long, size = None, _config(entries)["LONG"]
    if entries.count > size:
        keys, begin, end = entries.ends_of_blocks(size)
        stratum, item = entries.stratum_and_row(keys)
        place = stratum * num_touched + torch.searchsorted(rows, item)
        long = (place * entries.width, begin, end)
    values = grads[0].new_empty((num_strata, num_touched, *shape))
    touched = torch.empty((num_strata, num_touched), dtype=torch.uint8, device=device)
    cells = (bounds[:-1], bounds[1:])
    _launch(entries, cells, long, values, touched, num_touched, (0, 0), reverse)
    return rows, values, touched.view(torch.bool)


def run_add(dense, ids, strata, grads, reverse=False):
    """Add the sums to ``dense`` [S, V, ...]; arguments as of the reference.

    Entries out of range are left out: nobody waits for the device to say so.
    """
    num_strata, num_rows = dense.shape[:2]
    if dense.numel() == 0 or sum(len(x) for x in ids) == 0:
        return
    entries = _Entries(ids, strata, grads, num_strata, num_rows)
    out = dense.reshape(num_strata, num_rows, entries.width)
    if entries.width > 1 and out.stride(2) != 1:
        out = out.contiguous()
    strides = out.stride()[:2]
    cells = [torch.searchsorted(entries.keys, entries.keys, right=right) for right in (False, True)]
    long, size = None, _config(entries)["LONG"]
    if entries.count > size:
        keys, begin, end = entries.ends_of_blocks(size)
        stratum, item = entries.stratum_and_row(keys)
        place = torch.where(keys < 0, -1, stratum * strides[0] + item * strides[1])
        long = (place, begin, end)
    _launch(entries, cells, long, out, None, 0, strides, reverse)
    if out.data_ptr() != dense.data_ptr() or out.shape.numel() != dense.numel():
        dense.copy_(out.view(dense.shape))
