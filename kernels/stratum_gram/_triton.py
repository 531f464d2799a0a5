"""CUDA backend of ``stratum_gram``.

The columns of a parameter are cut into chunks of TILES x BLOCK. One program of the first kernel
owns one chunk: per tile and stratum t it multiplies the [S, BLOCK] tile by row t, which comes from
the first-level cache, sums in the compute dtype, and adds the [S] result to column t of a float64
[S, S] accumulator. One program of the second kernel owns one parameter and adds its chunks in
ascending order. No atomics: the cut depends on shapes alone, so the bits do not depend on the
number of multiprocessors. Parameters reach the kernel through a table of addresses, since a launch
per parameter would cost more than the work.
"""

import functools

import torch
import triton
import triton.language as tl

from .. import _configs
from .._tl import is_interpreted, padded

_FOLD_ROWS = 16
_FOLD_WARPS = 4
_TL_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _add_tile(
    acc,  # [S_PAD, S_PAD] float64
    grad_ptr,  # one parameter
    stride,  # elements between strata
    start,  # first column of the tile
    num_columns,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Add the products of one [S, BLOCK] tile; IS_WHOLE: no column is beyond the end."""
    o_s = tl.arange(0, S_PAD)
    o_c = start + tl.arange(0, BLOCK)
    m_s = o_s < S
    p_x = grad_ptr + o_s[:, None] * stride + o_c[None, :]
    if IS_WHOLE:
        b_x = tl.load(p_x, mask=m_s[:, None], other=0.0).to(COMPUTE)
    else:
        m_c = o_c < num_columns
        b_x = tl.load(p_x, mask=m_s[:, None] & m_c[None, :], other=0.0).to(COMPUTE)
    for t in tl.static_range(S):
        if IS_WHOLE:
            b_y = tl.load(grad_ptr + t * stride + o_c).to(COMPUTE)
        else:
            b_y = tl.load(grad_ptr + t * stride + o_c, mask=m_c, other=0.0).to(COMPUTE)
        products = tl.sum(b_x * b_y[None, :], axis=1).to(tl.float64)
        acc += tl.where(o_s[None, :] == t, products[:, None], 0.0)
    return acc


@triton.jit
def _stratum_gram_chunk_kernel(
    partial_ptr,  # [num_chunks, S, S] float64
    table_ptr,  # [P, 4] int64: address, stride of strata, columns, first chunk
    owner_ptr,  # [num_chunks] int32: parameter of each chunk
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # addresses and strides are multiples of 16 bytes
    REVERSE: tl.constexpr,  # tests run the programs in the opposite order
):
    """partial[chunk, s, t] = sum over the chunk's columns of x[s, c] x[t, c]."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    chunk = pid.to(tl.int64)
    p_row = table_ptr + tl.load(owner_ptr + chunk).to(tl.int64) * 4
    grad_ptr = tl.load(p_row).to(tl.pointer_type(DTYPE))
    stride = tl.load(p_row + 1)
    num_columns = tl.load(p_row + 2)
    first = (chunk - tl.load(p_row + 3)) * (TILES * BLOCK)
    if IS_ALIGNED:
        # Values from a table carry no alignment, and without it every load is a scalar one.
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        stride = tl.multiple_of(stride, 8)

    acc = tl.zeros([S_PAD, S_PAD], dtype=tl.float64)
    for tile in range(TILES):
        start = first + tile * BLOCK
        if start + BLOCK <= num_columns:
            acc = _add_tile(
                acc, grad_ptr, stride, start, num_columns, S, S_PAD, BLOCK, COMPUTE, True
            )
        elif start < num_columns:
            acc = _add_tile(
                acc, grad_ptr, stride, start, num_columns, S, S_PAD, BLOCK, COMPUTE, False
            )

    o_s = tl.arange(0, S_PAD)
    o_out = o_s[:, None] * S + o_s[None, :]
    m_out = (o_s[:, None] < S) & (o_s[None, :] < S)
    tl.store(partial_ptr + chunk * (S * S) + o_out, acc, mask=m_out)


@triton.jit
def _stratum_gram_fold_kernel(
    out_ptr,  # [P, S, S] float64
    partial_ptr,  # [num_chunks, S, S] float64
    first_ptr,  # [P + 1] int64: first chunk of each parameter
    S: tl.constexpr,
    PAIRS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """out[p] = sum of the parameter's chunks in ascending order; the upper triangle, mirrored."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    parameter = pid.to(tl.int64)
    first = tl.load(first_ptr + parameter)
    last = tl.load(first_ptr + parameter + 1)

    o_pair = tl.arange(0, PAIRS_PAD)
    m_pair = o_pair < S * S
    s = o_pair // S
    t = o_pair % S
    o_upper = tl.minimum(s, t) * S + tl.maximum(s, t)
    o_row = tl.arange(0, ROWS)
    acc = tl.zeros([PAIRS_PAD], dtype=tl.float64)
    for row in range(first, last, ROWS):
        o_chunk = row + o_row
        m_load = (o_chunk < last)[:, None] & m_pair[None, :]
        p_load = partial_ptr + o_chunk[:, None] * (S * S) + o_upper[None, :]
        acc += tl.sum(tl.load(p_load, mask=m_load, other=0.0), axis=0)
    tl.store(out_ptr + parameter * (S * S) + o_pair, acc, mask=m_pair)


@functools.lru_cache(maxsize=16)
def _chunks(columns, width, device):
    """Return [P + 1] int64 first chunks (host list, device) and [num_chunks] int32 owners."""
    counts = torch.tensor([-(-n // width) for n in columns])
    first = torch.zeros(len(columns) + 1, dtype=torch.int64)
    first[1:] = counts.cumsum(0)
    owners = torch.repeat_interleave(torch.arange(len(columns), dtype=torch.int32), counts)
    return first.tolist(), first.to(device), owners.to(device)


def _as_rows(grad):
    """Return [S, n] whose rows are contiguous; a view of ``grad`` where possible."""
    rows = grad.reshape(grad.shape[0], grad.numel() // grad.shape[0])
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def launch_options(strata, dtype, is_aligned, config, reverse=False):
    """Return the compile-time arguments of the first kernel from its config.

    Its TILE_ELEMENTS are of 4 bytes: twice 2048 spill for 16 strata (tests/.../test_gate.py).
    """
    return {
        "S": strata,
        "S_PAD": padded(strata),
        "BLOCK": config["TILE_ELEMENTS"] // padded(strata) // (2 if dtype is torch.float64 else 1),
        "TILES": config["TILES"],
        "DTYPE": _TL_DTYPE[dtype],
        "COMPUTE": tl.float64 if dtype is torch.float64 else tl.float32,
        "IS_ALIGNED": is_aligned,
        "REVERSE": reverse,
    }


def fold_options(strata, reverse=False):
    """Return the compile-time arguments of the second kernel."""
    return {
        "S": strata,
        "PAIRS_PAD": padded(strata * strata),
        "ROWS": _FOLD_ROWS,
        "REVERSE": reverse,
    }


def run(grads, out, reverse=False):
    """Write the Gram of every parameter into ``out`` [P, S, S] float64, contiguous."""
    rows = [_as_rows(grad) for grad in grads]
    strata, dtype, device = rows[0].shape[0], rows[0].dtype, rows[0].device
    is_aligned = all(
        r.data_ptr() % 16 == 0 and r.stride(0) * r.element_size() % 16 == 0 and r.stride(0) % 8 == 0
        for r in rows
    )
    name = str(dtype).removeprefix("torch.")
    config = _configs.lookup("stratum_gram", device, name, "all")
    options = launch_options(strata, dtype, is_aligned, config, reverse)
    width = options["BLOCK"] * options["TILES"]
    first_host, first, owners = _chunks(tuple(r.shape[1] for r in rows), width, device)
    table = torch.tensor(
        [
            [r.data_ptr(), r.stride(0), r.shape[1], start]
            for r, start in zip(rows, first_host, strict=False)  # one more start than rows
        ],
        dtype=torch.int64,
        pin_memory=not is_interpreted(),
    ).to(device, non_blocking=True)
    num_chunks = first_host[-1]
    partial = torch.empty((num_chunks, strata, strata), dtype=torch.float64, device=device)
    if num_chunks:
        _stratum_gram_chunk_kernel[(num_chunks,)](
            partial,
            table,
            owners,
            **options,
            num_warps=config["num_warps"],
            maxnreg=config.get("maxnreg"),
        )
    _stratum_gram_fold_kernel[(len(rows),)](
        out, partial, first, **fold_options(strata, reverse), num_warps=_FOLD_WARPS
    )
