"""CUDA backend of ``stratum_sums``.

Rows are cut into chunks of TILES x ROWS, columns into blocks; one program of the first kernel owns
one chunk of one block and keeps the sums of all strata in registers. A tile is reduced once for
every id between its smallest and its largest: once where rows are sorted. The second kernel adds
the chunks in ascending order in float64. No atomics, and the cut depends on shapes alone.
"""

import torch
import triton
import triton.language as tl

from .. import _configs
from .._tl import padded

FOLD_ROWS = 16
FOLD_COLUMNS = 64
_MIN_COLUMNS = 16


@triton.jit
def load_ids(ids_ptr, o_n, m_n, S: tl.constexpr):
    """Return the strata of rows as int32, -1 where there is none."""
    b_id = tl.load(ids_ptr + o_n, mask=m_n, other=-1)
    return tl.where((b_id >= 0) & (b_id < S), b_id, -1).to(tl.int32)


@triton.jit
def add_by_stratum(acc, b_x, b_id, S: tl.constexpr, S_PAD: tl.constexpr):
    """Add the rows of a tile [ROWS, COLUMNS] to the sums [S_PAD, COLUMNS] of their strata."""
    o_s = tl.arange(0, S_PAD)
    lowest = tl.min(tl.where(b_id < 0, S, b_id), axis=0)
    highest = tl.max(b_id, axis=0)
    for s in range(lowest, highest + 1):
        # Chosen, not multiplied by a mask: 0 * NaN would spread to other strata.
        part = tl.sum(tl.where((b_id == s)[:, None], b_x, 0.0), axis=0)
        acc += tl.where((o_s == s)[:, None], part[None, :], 0.0)
    return acc


@triton.jit
def store_sums(
    partial_ptr, acc, chunk, o_c, m_c, width, S: tl.constexpr, S_PAD: tl.constexpr
):  # fmt: skip
    """Write the sums of one chunk into partial [num_chunks, S, width]."""
    o_s = tl.arange(0, S_PAD)
    p_out = partial_ptr + (chunk * S + o_s[:, None]) * width + o_c[None, :]
    tl.store(p_out, acc, mask=(o_s < S)[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _stratum_sums_chunk_kernel(
    partial_ptr,  # [num_chunks, S, width] COMPUTE
    rows_ptr,  # [num_rows, width], columns are neighbours
    ids_ptr,  # [num_rows] int64
    num_rows,
    width,
    stride,  # elements between rows
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    COMPUTE: tl.constexpr,
    REVERSE: tl.constexpr,  # tests run the programs in the opposite order
):
    """partial[chunk, s] = sum of the chunk's rows of stratum s."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    chunk = pid.to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < width
    acc = tl.zeros([S_PAD, COLUMNS], dtype=COMPUTE)
    for tile in range(TILES):
        o_n = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        m_n = o_n < num_rows
        b_id = load_ids(ids_ptr, o_n, m_n, S)
        p_x = rows_ptr + o_n[:, None] * stride + o_c[None, :]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_c[None, :], other=0.0).to(COMPUTE)
        acc = add_by_stratum(acc, b_x, b_id, S, S_PAD)
    store_sums(partial_ptr, acc, chunk, o_c, m_c, width, S, S_PAD)


@triton.jit(do_not_specialize=["num_chunks"])
def _fold_kernel(
    out_ptr,  # [size]
    partial_ptr,  # [num_chunks, size]
    num_chunks,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """out[i] = sum of partial[:, i] in ascending order, in float64."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    o_i = pid.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_i = o_i < size
    o_row = tl.arange(0, ROWS).to(tl.int64)
    acc = tl.zeros([COLUMNS], dtype=tl.float64)
    for row in range(0, num_chunks, ROWS):
        m_load = (row + o_row < num_chunks)[:, None] & m_i[None, :]
        p_load = partial_ptr + (row + o_row)[:, None] * size + o_i[None, :]
        acc += tl.sum(tl.load(p_load, mask=m_load, other=0.0).to(tl.float64), axis=0)
    tl.store(out_ptr + o_i, acc, mask=m_i)


def as_rows(x):
    """Return ``x`` [N, D] with neighbouring columns; itself where possible."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def compute_dtype(*tensors):
    """Return the dtype of sums of a few rows: float32 at least."""
    wide = any(x is not None and x.dtype is torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def launch_options(strata, width, compute, config, reverse=False):
    """Return the compile-time arguments of the first kernel from its config."""
    columns = min(padded(width), config["TILE_ELEMENTS"] // config["ROWS"])
    per_stratum = config["TILE_ELEMENTS"] * 2 // padded(strata)
    return {
        "S": strata,
        "S_PAD": padded(strata),
        "ROWS": config["ROWS"],
        "COLUMNS": max(min(columns, per_stratum), min(padded(width), _MIN_COLUMNS)),
        "TILES": config["TILES"],
        "COMPUTE": tl.float64 if compute is torch.float64 else tl.float32,
        "REVERSE": reverse,
    }


def fold_options(reverse=False):
    """Return the compile-time arguments of the second kernel."""
    return {"ROWS": FOLD_ROWS, "COLUMNS": FOLD_COLUMNS, "REVERSE": reverse}


def fold(partial, out, reverse=False):
    """Write the sum of ``partial`` over its first dimension into ``out``, contiguous."""
    size = out.numel()
    if size:
        _fold_kernel[(triton.cdiv(size, FOLD_COLUMNS),)](
            out, partial, partial.shape[0], size, **fold_options(reverse), num_warps=4
        )


def run(rows, ids, out, reverse=False):
    """Write the sums into ``out`` [S, D], contiguous; arguments as of the reference."""
    (count, width), strata = rows.shape, out.shape[0]
    rows, ids = as_rows(rows), ids.contiguous()
    compute = compute_dtype(rows)
    config = _configs.lookup(
        "stratum_sums", rows.device, str(rows.dtype).removeprefix("torch."), "all"
    )
    options = launch_options(strata, width, compute, config, reverse)
    num_chunks = triton.cdiv(count, options["ROWS"] * options["TILES"])
    partial = torch.empty((num_chunks, strata, width), dtype=compute, device=rows.device)
    if partial.numel():
        grid = (num_chunks, triton.cdiv(width, options["COLUMNS"]))
        _stratum_sums_chunk_kernel[grid](
            partial, rows, ids, count, width, rows.stride(0), **options,
            num_warps=config["num_warps"],
        )  # fmt: skip
    fold(partial, out, reverse)
