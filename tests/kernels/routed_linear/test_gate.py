"""Compiles the Triton kernel for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import sys

import pytest

# After a colon the precision of products; without one, ieee.
FORMATS = ("bfloat16", "float16", "float32", "float32:tf32", "float32:tf32x3")
SAMPLE = [
    ("forward", 90, "bfloat16", 64, True),
    ("forward", 90, "float32", 64, False),
    ("backward", 90, "bfloat16", 64, False),
    ("forward", 80, "float16", 64, True),
    ("forward", 100, "bfloat16", 256, True),
    ("forward", 90, "float32:tf32", 64, False),
    ("backward", 90, "float32:tf32", 64, True),
    ("forward", 90, "float32:tf32x3", 64, True),
    ("backward", 80, "float32:tf32x3", 64, False),
]
EVERY = [
    (kind, arch, dtype, 64, has_order)
    for kind in ("forward", "backward")
    for arch in (80, 90, 100)
    for dtype in FORMATS
    for has_order in (False, True)
]
MAX_REGISTERS = 168  # three blocks of 128 threads on a multiprocessor
MAX_SHARED_BYTES = 73728


@pytest.fixture(scope="module")
def records(compiled):
    """Return what the compiler says about every case."""
    return compiled(__file__)


@pytest.mark.gate
@pytest.mark.parametrize("case", SAMPLE)
def test_kernel_stays_within_its_budget(records, case):
    record = records[case]
    assert record["stack"] == 0
    assert record["registers"] <= MAX_REGISTERS
    assert record["shared"] <= MAX_SHARED_BYTES
    assert record["atomics"] == []
    assert record["wide_copies"] + record["vector_loads"] >= 4  # rows and weights, 16 bytes each
    assert record["vector_stores"] >= 1
    assert (record["mma"] == 0) == (case[2] == "float32")  # tensor cores round float32


def compile_case(case):
    import torch
    from compile_gate import compile_kernel, pointer

    from pinet_fast.kernels import _configs
    from pinet_fast.kernels.routed_linear import _triton
    from pinet_fast.kernels.stratified_linear._triton import config_dtype

    kind, arch, dtype, width, has_order = case
    name, _, precision = dtype.partition(":")
    precision = precision or "ieee"
    config = _configs.of_arch(
        "routed_linear", f"sm_{arch}", config_dtype(getattr(torch, name), precision), "all"
    )
    has_bias = kind == "forward"  # the backward has none, and weights are transposed
    names = ["out_ptr", "rows_ptr", "weight_ptr", *(["bias_ptr"] if has_bias else [])]
    pointers = {**dict.fromkeys(names, pointer(name)), "tasks_ptr": "*i64"}
    if has_order:
        pointers["order_ptr"] = "*i64"
    near, far = ("deep_stride", "wide_stride") if has_bias else ("wide_stride", "deep_stride")
    options = _triton.launch_options(
        width, width, config, precision, has_order, has_bias, upcast=False
    )
    return compile_kernel(
        _triton._routed_kernel,
        pointers,
        {**options, near: 1},
        arch,
        divisible=("wide", "deep", "rows_stride", "head_stride", far),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


if __name__ == "__main__":
    from compile_gate import run_script

    run_script(sys.argv[1:], SAMPLE, EVERY, compile_case)
