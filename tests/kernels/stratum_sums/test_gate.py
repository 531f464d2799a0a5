"""Compiles the Triton kernels for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import sys

import pytest

DTYPES = ("float32", "float64", "bfloat16", "float16")
STRATA = (8, 64)
SAMPLE = [
    *(("chunk", 90, "float32", strata, 64) for strata in (4, 64)),
    ("chunk", 90, "bfloat16", 8, 64),
    ("chunk", 80, "float32", 8, 256),
    ("chunk", 100, "float64", 16, 64),
    ("fold", 90, "float32"),
]
EVERY = [
    *(
        ("chunk", arch, dtype, strata, 64)
        for arch in (80, 90, 100)
        for dtype in DTYPES
        for strata in STRATA
    ),
    *(("fold", arch, dtype) for arch in (80, 90, 100) for dtype in ("float32", "float64")),
]
MAX_REGISTERS = 128  # four blocks of 128 threads on a multiprocessor
MAX_SHARED_BYTES = 20480


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
    if case[0] == "chunk":
        assert record["vector_loads"] >= 1  # 16 bytes each


def compile_case(case):
    import torch
    from compile_gate import compile_kernel, pointer

    from pinet_fast.kernels import _configs
    from pinet_fast.kernels.stratum_sums import _triton

    kind, arch, dtype, *rest = case
    if kind == "fold":
        return compile_kernel(
            _triton._fold_kernel,
            {"out_ptr": pointer(dtype), "partial_ptr": pointer(dtype)},
            _triton.fold_options(),
            arch,
            integers=("num_chunks",),
            divisible=("size",),
        )
    strata, width = rest
    compute = torch.float64 if dtype == "float64" else torch.float32
    config = _configs.of_arch("stratum_sums", f"sm_{arch}", dtype, "all")
    return compile_kernel(
        _triton._stratum_sums_chunk_kernel,
        {
            "partial_ptr": pointer(str(compute).removeprefix("torch.")),
            "rows_ptr": pointer(dtype),
            "ids_ptr": "*i64",
        },
        _triton.launch_options(strata, width, compute, config),
        arch,
        integers=("num_rows",),
        divisible=("width", "stride"),
        num_warps=config["num_warps"],
    )


if __name__ == "__main__":
    from compile_gate import run_script

    run_script(sys.argv[1:], SAMPLE, EVERY, compile_case)
