"""Compiles the Triton kernels for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import sys

import pytest

DTYPES = ("float32", "float64", "bfloat16", "float16")
SAMPLE = [
    ("rows", 90, "float32", 4, 64),
    ("rows", 90, "float32", 8, 512),
    ("rows", 90, "bfloat16", 8, 256),
    ("rows", 90, "float32", 8, 1024),
    ("rows", 90, "float32", 8, 4096),
    ("rows", 80, "float32", 8, 64),
    ("rows", 100, "float32", 8, 64),
    ("rows", 80, "float32", 8, 16384),
    ("columns", 90, "float32", 16, 1024),
]
WIDTHS = {"rows": (64, 512, 2048, 4096, 16384), "columns": (1024,)}
LONGEST = {"float32": 16384, "float64": 4096, "bfloat16": 16384, "float16": 16384}
EVERY = [
    (kind, arch, dtype, 8, width)
    for kind in ("rows", "columns")
    for arch in (80, 90, 100)
    for dtype in DTYPES
    for width in WIDTHS[kind]
    if width <= LONGEST[dtype]
]
MAX_REGISTERS = 168  # three blocks of 128 threads on a multiprocessor
MAX_SHARED_BYTES = 36864


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
    assert record["vector_loads"] >= 2  # 16 bytes each: grad and rows
    assert record["vector_stores"] >= (case[0] == "rows")


def compile_case(case):
    import torch
    from compile_gate import compile_kernel, pointer

    from pinet_fast.kernels import _configs
    from pinet_fast.kernels.stratified_norm import _triton

    kind, arch, dtype, strata, width = case
    compute = torch.float64 if dtype == "float64" else torch.float32
    wide = pointer(str(compute).removeprefix("torch."))
    names = ("grad_rows_ptr", "grad_ptr", "rows_ptr", "weight_ptr")
    pointers = {
        **dict.fromkeys(names, pointer(dtype)),
        **dict.fromkeys(("partial_weight_ptr", "partial_bias_ptr", "mean_ptr", "rstd_ptr"), wide),
        "ids_ptr": "*i64",
    }
    bucket = _triton.row_bucket(width) if kind == "rows" else "columns"
    config = _configs.of_arch("stratified_norm_backward", f"sm_{arch}", dtype, bucket)
    if kind == "rows":
        kernel = _triton._norm_rows_kernel
        fused = _triton.is_fused(strata, width, compute)
        needs = (True, fused, fused)
        options = _triton.row_options(strata, width, compute, config, True, needs)
        num_warps = _triton.num_warps(width, config)
    else:
        kernel, num_warps = _triton._norm_columns_kernel, config["num_warps"]
        options = _triton.column_options(strata, width, compute, config)
        options = {**options, "HAS_WEIGHT": True, "HAS_BIAS": True}
    return compile_kernel(
        kernel,
        {name: kind for name, kind in pointers.items() if name in kernel.arg_names},
        options,
        arch,
        integers=("num_rows",),
        divisible=("width", "grad_stride", "rows_stride"),
        num_warps=num_warps,
    )


if __name__ == "__main__":
    from compile_gate import run_script

    run_script(sys.argv[1:], SAMPLE, EVERY, compile_case)
