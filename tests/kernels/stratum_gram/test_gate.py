"""Compiles the Triton kernels for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import sys

import pytest

CHUNK_CASES = [
    *((90, "float32", strata) for strata in (2, 4, 8, 16)),
    *((90, dtype, 8) for dtype in ("bfloat16", "float64")),
    *((arch, "float32", strata) for arch in (80, 100) for strata in (8, 16)),
]
FOLD_CASES = [(90, 2), (90, 8), (90, 16), (80, 16), (100, 16)]
SAMPLE = [*(("chunk", *case) for case in CHUNK_CASES), *(("fold", *case) for case in FOLD_CASES)]
EVERY = [
    *(
        ("chunk", arch, dtype, strata)
        for arch in (80, 90, 100)
        for dtype in ("float32", "float64", "bfloat16", "float16")
        for strata in (4, 16)
    ),
    *(("fold", arch, strata) for arch in (80, 90, 100) for strata in (4, 16)),
]
MAX_REGISTERS = 168  # three blocks of 128 threads on a multiprocessor
MAX_SHARED_BYTES = 8192


@pytest.fixture(scope="module")
def records(compiled):
    """Return what the compiler says about every case."""
    return compiled(__file__)


def check_budget(record):
    assert record["stack"] == 0
    assert record["registers"] <= MAX_REGISTERS
    assert record["shared"] <= MAX_SHARED_BYTES
    assert record["atomics"] == []


@pytest.mark.gate
@pytest.mark.parametrize(("arch", "dtype", "strata"), CHUNK_CASES)
def test_chunk_kernel_stays_within_its_budget(records, arch, dtype, strata):
    record = records["chunk", arch, dtype, strata]
    check_budget(record)
    assert record["vector_loads"] >= 2  # 16 bytes each: the tile, and the row it is multiplied by


@pytest.mark.gate
@pytest.mark.parametrize(("arch", "strata"), FOLD_CASES)
def test_fold_kernel_stays_within_its_budget(records, arch, strata):
    check_budget(records["fold", arch, strata])


def compile_case(case):
    import torch
    from compile_gate import compile_kernel

    from pinet_fast.kernels import _configs
    from pinet_fast.kernels.stratum_gram import _triton

    kind, arch, *rest = case
    if kind == "fold":
        return compile_kernel(
            _triton._stratum_gram_fold_kernel,
            {"out_ptr": "*fp64", "partial_ptr": "*fp64", "first_ptr": "*i64"},
            _triton.fold_options(*rest),
            arch,
        )
    dtype, strata = rest
    config = _configs.of_arch("stratum_gram", f"sm_{arch}", dtype, "all")
    return compile_kernel(
        _triton._stratum_gram_chunk_kernel,
        {"partial_ptr": "*fp64", "table_ptr": "*i64", "owner_ptr": "*i32"},
        _triton.launch_options(strata, getattr(torch, dtype), is_aligned=True, config=config),
        arch,
        num_warps=config["num_warps"],
        maxnreg=config.get("maxnreg"),
    )


if __name__ == "__main__":
    from compile_gate import run_script

    run_script(sys.argv[1:], SAMPLE, EVERY, compile_case)
