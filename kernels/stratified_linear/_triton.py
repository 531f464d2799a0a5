"""CUDA backend of ``stratified_linear_backward``.

``grad_rows`` is cuBLAS's, by torch. For the gradients by stratum, the sorted rows are cut into
tasks: pieces of one stratum, of a height that shapes alone decide. A program owns one tile of the
weight and one task, and writes its product into the slot of that task; a second kernel adds the
slots of each stratum in ascending order. Where every stratum has one task, slots are the result.
An empty stratum has a task without rows. The sums for the bias come from the tiles of ``grad`` that
are there already. Tasks reach the device by one small asynchronous copy a batch, not a layer.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl

from .. import _configs
from .._tl import is_interpreted, padded
from ..stratum_sums import _triton as sums
from ..stratum_sums._triton import as_rows

FOLD_COLUMNS = 1024
_MIN_BLOCK = 16  # of a matrix product
_LARGE = 128


@triton.jit
def to_tf32(x):
    """Return float32 rounded to the ten bits that tensor cores look at; NaN stays.

    They would drop the others, which is biased. And with operands changed in registers, sm_90
    copies them 16 bytes at a time: else it transposes by copies of 4 bytes, as its instruction for
    tf32 takes no transposed operand.
    """
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def _wgrad_kernel(
    weight_ptr,  # [num_tasks, wide, deep] float32
    bias_ptr,  # [num_tasks, wide] float32, written if HAS_BIAS
    grad_ptr,  # [N, wide], columns are neighbours
    rows_ptr,  # [N, deep], columns are neighbours
    order_ptr,  # [N] int64, read if HAS_ORDER
    tasks_ptr,  # [num_tasks, 3] int64: first row, end, stratum
    wide,
    deep,
    grad_stride,
    rows_stride,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_DEEP: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter cannot multiply bfloat16
    REVERSE: tl.constexpr,  # tests run the programs in the opposite order
):
    """weight[task] = grad[rows of the task]^T rows[rows of the task], one tile of it."""
    pid = tl.program_id(0)
    task = tl.program_id(1).to(tl.int64)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
        task = tl.num_programs(1) - 1 - task
    num_deep = tl.cdiv(deep, BLOCK_DEEP)
    tile_deep = pid % num_deep
    o_w = (pid // num_deep) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    o_d = tile_deep * BLOCK_DEEP + tl.arange(0, BLOCK_DEEP)
    m_w = o_w < wide
    m_d = o_d < deep
    first = tl.load(tasks_ptr + task * 3)
    end = tl.load(tasks_ptr + task * 3 + 1)
    acc = tl.zeros([BLOCK_WIDE, BLOCK_DEEP], dtype=tl.float32)
    acc_bias = tl.zeros([BLOCK_WIDE], dtype=tl.float32)
    for row in range(first, end, ROWS):
        o_n = row + tl.arange(0, ROWS)
        m_n = o_n < end
        o_from = o_n
        if HAS_ORDER:
            o_from = tl.load(order_ptr + o_n, mask=m_n, other=0)
        p_g = grad_ptr + o_from[:, None] * grad_stride + o_w[None, :]
        b_g = tl.load(p_g, mask=m_n[:, None] & m_w[None, :], other=0.0)
        p_x = rows_ptr + o_from[:, None] * rows_stride + o_d[None, :]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0.0)
        if UPCAST:
            b_g = b_g.to(tl.float32)
            b_x = b_x.to(tl.float32)
        b_a = b_g
        if PRECISION == "tf32":
            b_a = to_tf32(b_g)
            b_x = to_tf32(b_x)
        acc = tl.dot(tl.trans(b_a), b_x, acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc_bias += tl.sum(b_g.to(tl.float32), axis=0)
    p_out = weight_ptr + (task * wide + o_w[:, None]) * deep + o_d[None, :]
    tl.store(p_out, acc, mask=m_w[:, None] & m_d[None, :])
    if HAS_BIAS:
        tl.store(bias_ptr + task * wide + o_w, acc_bias, mask=m_w & (tile_deep == 0))


@triton.jit
def _slots_kernel(
    out_ptr,  # [S, size]
    slots_ptr,  # [num_tasks, size] float32
    first_ptr,  # [S + 1] int64: first task of each stratum
    size,
    COLUMNS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """out[s] = sum of the slots of stratum s in ascending order."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    stratum = tl.program_id(1).to(tl.int64)
    o_i = pid.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_i = o_i < size
    acc = tl.zeros([COLUMNS], dtype=tl.float32)
    for task in range(tl.load(first_ptr + stratum), tl.load(first_ptr + stratum + 1)):
        acc += tl.load(slots_ptr + task * size + o_i, mask=m_i, other=0.0)
    tl.store(out_ptr + stratum * size + o_i, acc, mask=m_i)


@functools.lru_cache(maxsize=64)
def plan(row_offsets, height, device):
    """Return tasks [num_tasks, 3] and first [S + 1] on the device, int64, and num_tasks.

    The layers of a model share the offsets of a batch, hence the cache.
    """
    tasks, first = [], []
    for s, (begin, end) in enumerate(itertools.pairwise(row_offsets)):
        first.append(len(tasks))
        tasks += [(row, min(row + height, end), s) for row in range(begin, end, height)]
        if begin == end:
            tasks.append((begin, end, s))
    numbers = torch.tensor(
        [*(n for task in tasks for n in task), *first, len(tasks)],
        dtype=torch.int64,
        pin_memory=not is_interpreted(),
    ).to(device, non_blocking=True)
    split = 3 * len(tasks)
    return numbers[:split].view(-1, 3), numbers[split:], len(tasks)


def bucket(wide, deep):
    """Return the range of shapes that a weight belongs to."""
    return "large" if min(wide, deep) >= _LARGE else "small"


def products_precision(dtype, precision):
    """Return the precision that a kernel gets: only float32 has a choice."""
    return precision if dtype is torch.float32 else "ieee"


def config_dtype(dtype, precision):
    """Return the name of a dtype in the table of configs."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}:{precision}" if dtype is torch.float32 else name


def launch_options(wide, deep, config, precision, has_order, has_bias, upcast, reverse=False):
    """Return the compile-time arguments of the first kernel from its config."""
    return {
        "BLOCK_WIDE": min(max(padded(wide), _MIN_BLOCK), config["BLOCK_WIDE"]),
        "BLOCK_DEEP": min(max(padded(deep), _MIN_BLOCK), config["BLOCK_DEEP"]),
        "ROWS": config["ROWS"],
        "HAS_ORDER": has_order,
        "HAS_BIAS": has_bias,
        "PRECISION": precision,
        "UPCAST": upcast,
        "REVERSE": reverse,
    }


def task_height(num_rows, num_tiles, config):
    """Return rows of a task: enough tasks to occupy a GPU, whatever its size, and no more."""
    tasks = max(config["programs"] // num_tiles, 1)
    least = 4 * config["ROWS"]
    return max(triton.cdiv(triton.cdiv(num_rows, tasks), config["ROWS"]) * config["ROWS"], least)


def run(
    grad, rows, weight, ids, row_offsets, order, grad_rows, grad_weight, grad_bias,
    precision="ieee", reverse=False,
):  # fmt: skip
    """Write the gradients that are wanted, contiguous; arguments as of the reference."""
    if grad_rows is not None:
        torch.mm(grad, weight, out=grad_rows)
    if grad_weight is None or grad_weight.numel() == 0:
        if grad_bias is not None:
            sums.run(grad, ids, grad_bias, reverse)
        return
    (strata, wide, deep), device = grad_weight.shape, grad.device
    precision = products_precision(grad.dtype, precision)
    grad, rows = as_rows(grad), as_rows(rows)
    config = _configs.lookup(
        "stratified_linear_backward", device, config_dtype(grad.dtype, precision),
        bucket(wide, deep),
    )  # fmt: skip
    options = launch_options(
        wide, deep, config, precision, order is not None, grad_bias is not None,
        is_interpreted(), reverse,
    )  # fmt: skip
    tiles = triton.cdiv(wide, options["BLOCK_WIDE"]) * triton.cdiv(deep, options["BLOCK_DEEP"])
    height = task_height(rows.shape[0], tiles, config)
    tasks, first, num_tasks = plan(tuple(row_offsets), height, device)
    outs = [grad_weight, grad_bias]
    slots = outs
    if num_tasks > strata:
        slots = [
            None if x is None else x.new_empty((num_tasks, *x.shape[1:]), dtype=torch.float32)
            for x in outs
        ]
    _wgrad_kernel[(tiles, num_tasks)](
        *slots, grad, rows, None if order is None else order.contiguous(), tasks, wide, deep,
        grad.stride(0), rows.stride(0), **options,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
        maxnreg=config.get("maxnreg"),
    )  # fmt: skip
    if num_tasks > strata:
        for out, partial in zip(outs, slots, strict=True):
            if out is not None:
                size = out[0].numel()
                _slots_kernel[(triton.cdiv(size, FOLD_COLUMNS), strata)](
                    out, partial, first, size, COLUMNS=FOLD_COLUMNS, REVERSE=reverse, num_warps=4
                )
