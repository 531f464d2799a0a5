"""CUDA backend of ``stratified_norm_backward``.

One program of the first kernel owns a chunk of TILES x ROWS rows and holds whole rows in registers:
it writes ``grad_rows`` and, where the sums of all strata fit beside them, the chunk's sums for
scale and shift, which cost no further reading. Where they do not fit, a second kernel reads
``grad`` and ``rows`` again, in blocks of columns. Chunks are added in ascending order in float64.
"""

import torch
import triton
import triton.language as tl

from .. import _configs
from .._tl import padded
from ..stratum_sums._triton import (
    add_by_stratum,
    as_rows,
    compute_dtype,
    fold,
    load_ids,
    store_sums,
)
from ..stratum_sums._triton import launch_options as column_options

# Numbers [S, D] that the first kernel sums beside its tile; more spill (tests/.../test_gate.py).
_FUSED_SUMS = 4096


@triton.jit(do_not_specialize=["num_rows"])
def _norm_rows_kernel(
    grad_rows_ptr,  # [num_rows, width]
    partial_weight_ptr,  # [num_chunks, S, width] COMPUTE
    partial_bias_ptr,  # [num_chunks, S, width] COMPUTE
    grad_ptr,  # [num_rows, width], columns are neighbours
    rows_ptr,  # [num_rows, width], columns are neighbours
    mean_ptr,  # [num_rows]
    rstd_ptr,  # [num_rows]
    weight_ptr,  # [width], read if HAS_SCALE
    ids_ptr,  # [num_rows] int64, read if there are sums
    num_rows,
    width,
    grad_stride,
    rows_stride,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # all of them
    TILES: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REVERSE: tl.constexpr,  # tests run the programs in the opposite order
):
    """Gradients of one chunk's rows, and its sums by stratum."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    chunk = pid.to(tl.int64)
    o_c = tl.arange(0, COLUMNS)
    m_c = o_c < width
    if HAS_SCALE:
        scale = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(COMPUTE)
    sum_weight = tl.zeros([S_PAD, COLUMNS if HAS_WEIGHT else 1], dtype=COMPUTE)
    sum_bias = tl.zeros([S_PAD, COLUMNS if HAS_BIAS else 1], dtype=COMPUTE)
    for tile in range(TILES):
        o_n = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        m_n = o_n < num_rows
        m = m_n[:, None] & m_c[None, :]
        p_g = grad_ptr + o_n[:, None] * grad_stride + o_c[None, :]
        b_grad = tl.load(p_g, mask=m, other=0.0).to(COMPUTE)
        p_x = rows_ptr + o_n[:, None] * rows_stride + o_c[None, :]
        b_x = tl.load(p_x, mask=m, other=0.0).to(COMPUTE)
        b_mean = tl.load(mean_ptr + o_n, mask=m_n, other=0.0).to(COMPUTE)
        b_rstd = tl.load(rstd_ptr + o_n, mask=m_n, other=0.0).to(COMPUTE)
        b_normed = (b_x - b_mean[:, None]) * b_rstd[:, None]
        if HAS_ROWS:
            b_g = b_grad * scale[None, :] if HAS_SCALE else b_grad
            average = tl.sum(b_g, axis=1) / width
            along = tl.sum(b_g * b_normed, axis=1) / width
            b_out = (b_g - average[:, None] - b_normed * along[:, None]) * b_rstd[:, None]
            tl.store(grad_rows_ptr + o_n[:, None] * width + o_c[None, :], b_out, mask=m)
        if HAS_WEIGHT or HAS_BIAS:
            b_id = load_ids(ids_ptr, o_n, m_n, S)
            if HAS_WEIGHT:
                sum_weight = add_by_stratum(sum_weight, b_grad * b_normed, b_id, S, S_PAD)
            if HAS_BIAS:
                sum_bias = add_by_stratum(sum_bias, b_grad, b_id, S, S_PAD)
    if HAS_WEIGHT:
        store_sums(partial_weight_ptr, sum_weight, chunk, o_c, m_c, width, S, S_PAD)
    if HAS_BIAS:
        store_sums(partial_bias_ptr, sum_bias, chunk, o_c, m_c, width, S, S_PAD)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_columns_kernel(
    partial_weight_ptr,  # [num_chunks, S, width] COMPUTE
    partial_bias_ptr,  # [num_chunks, S, width] COMPUTE
    grad_ptr,
    rows_ptr,
    mean_ptr,
    rstd_ptr,
    ids_ptr,
    num_rows,
    width,
    grad_stride,
    rows_stride,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a block of them
    TILES: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The sums by stratum of one chunk and one block of columns."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    chunk = pid.to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < width
    sum_weight = tl.zeros([S_PAD, COLUMNS if HAS_WEIGHT else 1], dtype=COMPUTE)
    sum_bias = tl.zeros([S_PAD, COLUMNS if HAS_BIAS else 1], dtype=COMPUTE)
    for tile in range(TILES):
        o_n = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        m_n = o_n < num_rows
        m = m_n[:, None] & m_c[None, :]
        b_id = load_ids(ids_ptr, o_n, m_n, S)
        p_g = grad_ptr + o_n[:, None] * grad_stride + o_c[None, :]
        b_grad = tl.load(p_g, mask=m, other=0.0).to(COMPUTE)
        if HAS_WEIGHT:
            p_x = rows_ptr + o_n[:, None] * rows_stride + o_c[None, :]
            b_x = tl.load(p_x, mask=m, other=0.0).to(COMPUTE)
            b_mean = tl.load(mean_ptr + o_n, mask=m_n, other=0.0).to(COMPUTE)
            b_rstd = tl.load(rstd_ptr + o_n, mask=m_n, other=0.0).to(COMPUTE)
            b_normed = (b_x - b_mean[:, None]) * b_rstd[:, None]
            sum_weight = add_by_stratum(sum_weight, b_grad * b_normed, b_id, S, S_PAD)
        if HAS_BIAS:
            sum_bias = add_by_stratum(sum_bias, b_grad, b_id, S, S_PAD)
    if HAS_WEIGHT:
        store_sums(partial_weight_ptr, sum_weight, chunk, o_c, m_c, width, S, S_PAD)
    if HAS_BIAS:
        store_sums(partial_bias_ptr, sum_bias, chunk, o_c, m_c, width, S, S_PAD)


def is_fused(strata, width, compute):
    """Return whether the first kernel makes the sums too; decided by shapes alone."""
    numbers = padded(strata) * padded(width) * (2 if compute is torch.float64 else 1)
    return numbers <= _FUSED_SUMS


def row_options(strata, width, compute, config, has_scale, needs, reverse=False):
    """Return the compile-time arguments of the first kernel; ``needs``: rows, weight, bias."""
    elements = config["TILE_ELEMENTS"] // (2 if compute is torch.float64 else 1)
    return {
        "S": strata,
        "S_PAD": padded(strata),
        "ROWS": min(max(elements // padded(width), 1), 64),
        "COLUMNS": padded(width),
        "TILES": config["TILES"],
        "COMPUTE": tl.float64 if compute is torch.float64 else tl.float32,
        "HAS_SCALE": has_scale,
        "HAS_ROWS": needs[0],
        "HAS_WEIGHT": needs[1],
        "HAS_BIAS": needs[2],
        "REVERSE": reverse,
    }


def row_bucket(width):
    """Return the range of widths that a row belongs to."""
    return "narrow" if padded(width) <= 1024 else "wide"


def num_warps(width, config):
    """Return the warps of the first kernel: rows beyond 4096 numbers need more threads."""
    return 16 if padded(width) > 4096 else config["num_warps"]


def run(grad, rows, mean, rstd, weight, ids, grad_rows, grad_weight, grad_bias, reverse=False):
    """Write the gradients that are wanted, contiguous; arguments as of the reference."""
    width = rows.shape[1]
    sums = [out for out in (grad_weight, grad_bias) if out is not None]
    strata = sums[0].shape[0] if sums else 1
    if width == 0:
        return
    compute = compute_dtype(grad, rows, mean, rstd, weight)
    inputs = (as_rows(grad), as_rows(rows), mean.contiguous(), rstd.contiguous())
    strides = (inputs[0].stride(0), inputs[1].stride(0))
    needs = [out is not None for out in (grad_rows, grad_weight, grad_bias)]
    fused = is_fused(strata, width, compute)
    by_rows = [needs[0], needs[1] and fused, needs[2] and fused]
    partial = None
    if any(by_rows):
        config = _config(rows, row_bucket(width))
        options = row_options(strata, width, compute, config, weight is not None, by_rows, reverse)
        partial = _partial_sums(rows, strata if fused else 0, options, compute)
        if chunks := partial.shape[1]:
            _norm_rows_kernel[(chunks,)](
                grad_rows, *partial, *inputs, None if weight is None else weight.contiguous(),
                ids.contiguous(), *rows.shape, *strides, **options,
                num_warps=num_warps(width, config),
            )  # fmt: skip
    if sums and not fused:
        config = _config(rows, "columns")
        options = column_options(strata, width, compute, config, reverse)
        partial = _partial_sums(rows, strata, options, compute)
        if chunks := partial.shape[1]:
            _norm_columns_kernel[(chunks, triton.cdiv(width, options["COLUMNS"]))](
                *partial, *inputs, ids.contiguous(), *rows.shape, *strides, **options,
                HAS_WEIGHT=needs[1], HAS_BIAS=needs[2], num_warps=config["num_warps"],
            )  # fmt: skip
    for i, out in enumerate((grad_weight, grad_bias)):
        if out is not None:
            fold(partial[i], out, reverse)


def _config(rows, bucket):
    dtype = str(rows.dtype).removeprefix("torch.")
    return _configs.lookup("stratified_norm_backward", rows.device, dtype, bucket)


def _partial_sums(rows, strata, options, compute):
    """Return room for the sums of every chunk: for scale and for shift."""
    (count, width), height = rows.shape, options["ROWS"] * options["TILES"]
    shape = (2, triton.cdiv(count, height), strata, width)
    return torch.empty(shape, dtype=compute, device=rows.device)
