"""CUDA backend of ``routed_linear`` and its backward.

The sorted rows are cut into tasks: at most BLOCK_ROWS rows of one head. A program owns one task and
one block of outputs, reads rows and writes results through the permutation, so that nothing is
gathered first. The gradient of the rows is the same kernel with the weights transposed by their
strides; those of weight and bias are the kernels of ``stratified_linear_backward``.
"""

import triton
import triton.language as tl

from .. import _configs
from .._tl import is_interpreted, padded
from ..stratified_linear import _triton as by_stratum
from ..stratified_linear._triton import to_tf32
from ..stratum_sums._triton import as_rows

_MIN_BLOCK = 16  # of a matrix product


@triton.jit
def _routed_kernel(
    out_ptr,  # [N, wide]
    rows_ptr,  # [N, deep], columns are neighbours
    weight_ptr,  # [H, wide, deep], any strides
    bias_ptr,  # [H, wide], read if HAS_BIAS
    order_ptr,  # [N] int64, read if HAS_ORDER
    tasks_ptr,  # [num_tasks, 3] int64: first row, end, head
    wide,
    deep,
    rows_stride,
    head_stride,
    wide_stride,
    deep_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_DEEP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter cannot multiply bfloat16
    REVERSE: tl.constexpr,  # tests run the programs in the opposite order
):
    """out[i] = weight[head] rows[i] + bias[head] for the rows of one task, a block of outputs."""
    pid = tl.program_id(0)
    task = tl.program_id(1).to(tl.int64)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
        task = tl.num_programs(1) - 1 - task
    first = tl.load(tasks_ptr + task * 3)
    end = tl.load(tasks_ptr + task * 3 + 1)
    head = tl.load(tasks_ptr + task * 3 + 2)
    o_n = first + tl.arange(0, BLOCK_ROWS)
    m_n = o_n < end
    o_from = o_n
    if HAS_ORDER:
        o_from = tl.load(order_ptr + o_n, mask=m_n, other=0)
    o_w = pid * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    m_w = o_w < wide
    acc = tl.zeros([BLOCK_ROWS, BLOCK_WIDE], dtype=tl.float32)
    p_weight = weight_ptr + head * head_stride + o_w.to(tl.int64)[None, :] * wide_stride
    for column in range(0, deep, BLOCK_DEEP):
        o_d = column + tl.arange(0, BLOCK_DEEP)
        m_d = o_d < deep
        p_x = rows_ptr + o_from[:, None] * rows_stride + o_d[None, :]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0.0)
        p_w = p_weight + o_d.to(tl.int64)[:, None] * deep_stride
        b_w = tl.load(p_w, mask=m_d[:, None] & m_w[None, :], other=0.0)
        if UPCAST:
            b_x = b_x.to(tl.float32)
            b_w = b_w.to(tl.float32)
        if PRECISION == "tf32":
            b_x = to_tf32(b_x)
            b_w = to_tf32(b_w)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + head * wide + o_w, mask=m_w, other=0.0).to(tl.float32)[None, :]
    p_out = out_ptr + o_from[:, None] * wide + o_w[None, :]
    tl.store(p_out, acc, mask=m_n[:, None] & m_w[None, :])


def launch_options(wide, deep, config, precision, has_order, has_bias, upcast, reverse=False):
    """Return the compile-time arguments from their config."""
    return {
        "BLOCK_ROWS": config["BLOCK_ROWS"],
        "BLOCK_WIDE": min(max(padded(wide), _MIN_BLOCK), config["BLOCK_WIDE"]),
        "BLOCK_DEEP": min(max(padded(deep), _MIN_BLOCK), config["BLOCK_DEEP"]),
        "HAS_ORDER": has_order,
        "HAS_BIAS": has_bias,
        "PRECISION": precision,
        "UPCAST": upcast,
        "REVERSE": reverse,
    }


def run_forward(rows, weight, bias, ids, row_offsets, order, out, precision="ieee", reverse=False):
    """Write ``out``, contiguous; arguments as of the reference."""
    if out.numel() == 0:
        return
    _, wide, deep = weight.shape
    rows = as_rows(rows)
    precision = by_stratum.products_precision(rows.dtype, precision)
    dtype = by_stratum.config_dtype(rows.dtype, precision)
    config = _configs.lookup("routed_linear", rows.device, dtype, "all")
    options = launch_options(
        wide, deep, config, precision, order is not None, bias is not None, is_interpreted(),
        reverse,
    )  # fmt: skip
    tasks, _, num_tasks = by_stratum.plan(tuple(row_offsets), config["BLOCK_ROWS"], rows.device)
    _routed_kernel[(triton.cdiv(wide, options["BLOCK_WIDE"]), num_tasks)](
        out, rows, weight, None if bias is None else bias.contiguous(),
        None if order is None else order.contiguous(), tasks, wide, deep, rows.stride(0),
        *weight.stride(), **options, num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )  # fmt: skip


def run_backward(
    grad, rows, weight, ids, row_offsets, order, grad_rows, grad_weight, grad_bias,
    precision="ieee", reverse=False,
):  # fmt: skip
    """Write the gradients that are wanted, contiguous; arguments as of the reference."""
    if grad_rows is not None:
        transposed = weight.transpose(1, 2)
        run_forward(grad, transposed, None, ids, row_offsets, order, grad_rows, precision, reverse)
    by_stratum.run(
        grad, rows, None, ids, row_offsets, order, None, grad_weight, grad_bias, precision, reverse
    )
