"""Compiles the Triton kernels for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import sys

import pytest

FORMATS = [
    ("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32"),
    ("float32", "tf32x3"),
]  # fmt: skip
SAMPLE = [
    *(("wgrad", 90, dtype, precision, 64, True) for dtype, precision in FORMATS),
    ("wgrad", 90, "bfloat16", "ieee", 256, False),
    ("wgrad", 90, "float32", "tf32", 256, False),
    ("wgrad", 80, "bfloat16", "ieee", 64, True),
    ("wgrad", 80, "float32", "tf32x3", 64, True),
    ("wgrad", 100, "bfloat16", "ieee", 64, True),
    ("slots", 90),
]
EVERY = [
    *(
        ("wgrad", arch, dtype, precision, width, has_order)
        for arch in (80, 90, 100)
        for dtype, precision in FORMATS
        for width, has_order in ((64, True), (256, True), (64, False))
    ),
    *(("slots", arch) for arch in (80, 90, 100)),
]
MAX_REGISTERS = {4: 168, 8: 200}  # by warps
MAX_SHARED_BYTES = 98304  # two blocks on a multiprocessor of sm_90


@pytest.fixture(scope="module")
def records(compiled):
    """Return what the compiler says about every case."""
    return compiled(__file__)


@pytest.mark.gate
@pytest.mark.parametrize("case", SAMPLE)
def test_kernel_stays_within_its_budget(records, case):
    record = records[case]
    assert record["stack"] == 0
    assert record["registers"] <= MAX_REGISTERS[8 if case[0] == "wgrad" and case[4] > 64 else 4]
    assert record["shared"] <= MAX_SHARED_BYTES
    assert record["atomics"] == []
    assert record["vector_stores"] >= 1


@pytest.mark.gate
@pytest.mark.parametrize("case", [case for case in SAMPLE if case[0] == "wgrad"])
def test_rows_are_copied_16_bytes_at_a_time_and_multiplied_by_tensor_cores(records, case):
    record = records[case]
    is_exact = case[2:4] == ("float32", "ieee")  # tensor cores round float32
    assert record["wide_copies"] >= 4
    assert (record["mma"] == 0) if is_exact else (record["mma"] >= 1)


def compile_case(case):
    import torch
    from compile_gate import compile_kernel, pointer

    from pinet_fast.kernels import _configs
    from pinet_fast.kernels.stratified_linear import _triton

    kind, arch, *rest = case
    if kind == "slots":
        return compile_kernel(
            _triton._slots_kernel,
            {"out_ptr": "*fp32", "slots_ptr": "*fp32", "first_ptr": "*i64"},
            {"COLUMNS": _triton.FOLD_COLUMNS, "REVERSE": False},
            arch,
            divisible=("size",),
        )
    name, precision, width, has_order = rest
    dtype = getattr(torch, name)
    config = _configs.of_arch(
        "stratified_linear_backward", f"sm_{arch}", _triton.config_dtype(dtype, precision),
        _triton.bucket(width, width),
    )  # fmt: skip
    pointers = {
        "weight_ptr": "*fp32", "bias_ptr": "*fp32", "grad_ptr": pointer(name),
        "rows_ptr": pointer(name), "tasks_ptr": "*i64",
    }  # fmt: skip
    return compile_kernel(
        _triton._wgrad_kernel,
        {**pointers, "order_ptr": "*i64"} if has_order else pointers,
        _triton.launch_options(width, width, config, precision, has_order, True, upcast=False),
        arch,
        divisible=("wide", "deep", "grad_stride", "rows_stride"),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        maxnreg=config.get("maxnreg"),
    )


if __name__ == "__main__":
    from compile_gate import run_script

    run_script(sys.argv[1:], SAMPLE, EVERY, compile_case)
