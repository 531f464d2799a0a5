"""CUDA backend of ``stratum_combine``.

The elements of a parameter are cut into chunks of TILES x BLOCK; one program owns one chunk and
adds the strata's slices in ascending order, each with its weight, in the compute dtype. A slice
without weight is masked out of the load. Parameters reach the kernel through a table of addresses:
one launch for all that are dense and one for all that have rows.
"""

import functools

import torch
import triton
import triton.language as tl

from .. import _configs
from .._tl import is_interpreted

_TL_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _combine_tile(
    grad_ptr, stride, out_ptr, weight_ptr, scale, rows_ptr, width, num_rows, accumulate,
    start, num_elements,
    S: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
    HAS_ROWS: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Combine BLOCK elements; IS_WHOLE: none is beyond the end."""
    o_e = start + tl.arange(0, BLOCK)
    m_e = o_e < num_elements
    acc = tl.zeros([BLOCK], dtype=COMPUTE)
    for s in tl.static_range(S):
        w = tl.load(weight_ptr + s)
        w = tl.where(w == 0, 0.0, w * scale)
        # Nothing of a stratum without weight is read: what it holds must not show.
        # By way of an int32: the interpreter makes float64 of a condition that it broadcasts.
        m_x = tl.broadcast_to((w != 0).to(tl.int32), [BLOCK]) != 0
        if not IS_WHOLE:
            m_x = m_x & m_e
        b_x = tl.load(grad_ptr + s * stride + o_e, mask=m_x, other=0.0).to(COMPUTE)
        acc += b_x * w.to(COMPUTE)
    o_out = o_e
    if HAS_ROWS:
        touched = o_e // width
        if IS_WHOLE:
            row = tl.load(rows_ptr + touched)
        else:
            row = tl.load(rows_ptr + touched, mask=m_e, other=0)
        o_out = row * width + (o_e - touched * width)
        m_e = m_e & (row >= 0) & (row < num_rows)
    p_out = out_ptr + o_out
    if IS_WHOLE and not HAS_ROWS:
        if accumulate != 0:
            acc += tl.load(p_out).to(COMPUTE)
        tl.store(p_out, acc)
    else:
        if accumulate != 0:
            acc += tl.load(p_out, mask=m_e, other=0.0).to(COMPUTE)
        tl.store(p_out, acc, mask=m_e)


@triton.jit
def _stratum_combine_kernel(
    table_ptr,  # [P, 10] int64, see _table
    owner_ptr,  # [num_chunks] int32: parameter of each chunk
    weight_ptr,  # [num_weights, S] float64
    scale_ptr,  # float64, read if HAS_SCALE
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # addresses and strides are multiples of 16 bytes
    REVERSE: tl.constexpr,  # tests run the programs in the opposite order
):
    """out[e] (+)= sum_s w[s] scale x[s, e] for the elements of one chunk."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    chunk = pid.to(tl.int64)
    p_row = table_ptr + tl.load(owner_ptr + chunk).to(tl.int64) * 10
    grad_ptr = tl.load(p_row).to(tl.pointer_type(DTYPE))
    stride = tl.load(p_row + 1)
    out_ptr = tl.load(p_row + 2).to(tl.pointer_type(OUT_DTYPE))
    num_elements = tl.load(p_row + 3)
    accumulate = tl.load(p_row + 4)
    weight_ptr += tl.load(p_row + 5) * S
    rows_ptr = tl.load(p_row + 6).to(tl.pointer_type(tl.int64))
    width = tl.load(p_row + 7)
    num_rows = tl.load(p_row + 8)
    first = (chunk - tl.load(p_row + 9)) * (TILES * BLOCK)
    if IS_ALIGNED:
        # Values from a table carry no alignment, and without it every access is a scalar one.
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        out_ptr = tl.multiple_of(out_ptr, 16)
        stride = tl.multiple_of(stride, 8)
    scale = tl.load(scale_ptr) if HAS_SCALE else 1.0
    for tile in range(TILES):
        start = first + tile * BLOCK
        if start + BLOCK <= num_elements:
            _combine_tile(
                grad_ptr, stride, out_ptr, weight_ptr, scale, rows_ptr, width, num_rows,
                accumulate, start, num_elements, S, BLOCK, COMPUTE, HAS_ROWS, True,
            )  # fmt: skip
        elif start < num_elements:
            _combine_tile(
                grad_ptr, stride, out_ptr, weight_ptr, scale, rows_ptr, width, num_rows,
                accumulate, start, num_elements, S, BLOCK, COMPUTE, HAS_ROWS, False,
            )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _chunks(sizes, width, device):
    """Return the first chunk of every parameter, a list, and [num_chunks] int32 owners."""
    counts = torch.tensor([-(-n // width) for n in sizes])
    first = (counts.cumsum(0) - counts).tolist()
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
    return first, owners.to(device)


def _is_dense(x):
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _flat(grad, out, has_rows):
    """Return [S, n] with contiguous rows and the output [n] that they add up to, in one order."""
    strata, num_elements = grad.shape[0], grad.numel() // grad.shape[0]
    pairs = zip(grad.stride()[1:], out.stride(), out.shape, strict=True)
    if not has_rows and _is_dense(out) and all(g == o for g, o, size in pairs if size != 1):
        return (
            grad.as_strided((strata, num_elements), (grad.stride(0), 1)),
            out.as_strided((num_elements,), (1,)),
        )
    slices = grad.reshape(strata, num_elements)
    if num_elements > 1 and slices.stride(1) != 1:
        slices = slices.contiguous()
    return slices, out.contiguous().view(-1)


def launch_options(
    strata, dtype, out_dtype, has_scale, has_rows, is_aligned, config, reverse=False
):  # fmt: skip
    """Return the compile-time arguments from their config.

    Its TILE_BYTES are of one slice: 2048 are a load of 16 bytes a thread and stratum. With two of
    them 128 registers are used instead of 76 (S = 8, float32).
    """
    return {
        "S": strata,
        "BLOCK": config["TILE_BYTES"] // dtype.itemsize,
        "TILES": config["TILES"],
        "DTYPE": _TL_DTYPE[dtype],
        "OUT_DTYPE": _TL_DTYPE[out_dtype],
        "COMPUTE": tl.float64 if torch.float64 in (dtype, out_dtype) else tl.float32,
        "HAS_SCALE": has_scale,
        "HAS_ROWS": has_rows,
        "IS_ALIGNED": is_aligned,
        "REVERSE": reverse,
    }


def run(grads, weights, outs, scale, accumulate, rows, reverse=False):
    """Write or add the weighted sums into ``outs``; arguments as of the reference."""
    weight_step = 0 if weights.stride(0) == 0 else 1
    weights = weights[:1].contiguous() if weight_step == 0 else weights.contiguous()
    for has_rows in (False, True):
        chosen = [p for p, row in enumerate(rows) if (row is not None) == has_rows]
        if chosen:
            _launch(chosen, grads, weights, weight_step, outs, scale, accumulate, rows, reverse)


def _launch(chosen, grads, weights, weight_step, outs, scale, accumulate, rows, reverse):
    has_rows = rows[chosen[0]] is not None
    keep, entries, copied = [], [], []
    is_aligned = True
    for p in chosen:
        grad, out = _flat(grads[p], outs[p], has_rows)
        row = rows[p].contiguous() if has_rows else None
        if has_rows and not accumulate[p]:
            out.zero_()
        if out.data_ptr() != outs[p].data_ptr():
            copied.append((outs[p], out))
        num_rows = outs[p].shape[0] if has_rows else 0
        keep.append((grad, out, row))
        entries.append([
            grad.data_ptr(), grad.stride(0), out.data_ptr(), grad.shape[1], int(accumulate[p]),
            p * weight_step, row.data_ptr() if has_rows else 0,
            max(out.numel() // max(num_rows, 1), 1), num_rows,
        ])  # fmt: skip
        is_aligned &= (grad.data_ptr() | out.data_ptr()) % 16 == 0 and grad.stride(0) % 8 == 0
    dtype = grads[chosen[0]].dtype
    config = _configs.lookup(
        "stratum_combine", weights.device, str(dtype).removeprefix("torch."), "all"
    )
    options = launch_options(
        weights.shape[1], dtype, outs[chosen[0]].dtype, scale is not None, has_rows, is_aligned,
        config, reverse,
    )  # fmt: skip
    sizes = tuple(grad.shape[1] for grad, _, _ in keep)
    first, owners = _chunks(sizes, options["BLOCK"] * options["TILES"], weights.device)
    table = torch.tensor(
        [[*entry, start] for entry, start in zip(entries, first, strict=True)],
        dtype=torch.int64,
        pin_memory=not is_interpreted(),
    ).to(weights.device, non_blocking=True)
    if len(owners):
        _stratum_combine_kernel[(len(owners),)](
            table, owners, weights, weights if scale is None else scale, **options,
            num_warps=config["num_warps"],
        )  # fmt: skip
    for out, copy in copied:
        out.copy_(copy.view(out.shape))
