"""Compiles the Triton kernel for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import sys

import pytest

CASES = [
    *((90, "float32", strata, False) for strata in (2, 4, 8, 16)),
    *((90, dtype, 8, False) for dtype in ("bfloat16", "float64")),
    (90, "float32", 8, True),
    *((arch, "float32", 8, False) for arch in (80, 100)),
]
EVERY = [
    (arch, dtype, strata, has_rows)
    for arch in (80, 90, 100)
    for dtype in ("float32", "float64", "bfloat16", "float16")
    for strata in (2, 8)
    for has_rows in (False, True)
]
MAX_REGISTERS = 128  # four blocks of 128 threads on a multiprocessor, each with S loads in flight
MAX_SHARED_BYTES = 8192


@pytest.fixture(scope="module")
def records(compiled):
    """Return what the compiler says about every case."""
    return compiled(__file__)


@pytest.mark.gate
@pytest.mark.parametrize(("arch", "dtype", "strata", "has_rows"), CASES)
def test_kernel_stays_within_its_budget(records, arch, dtype, strata, has_rows):
    record = records[arch, dtype, strata, has_rows]
    assert record["stack"] == 0
    assert record["registers"] <= MAX_REGISTERS
    assert record["shared"] <= MAX_SHARED_BYTES
    assert record["atomics"] == []
    assert record["vector_loads"] >= strata  # 16 bytes each
    assert record["vector_stores"] >= (0 if has_rows else 1)


def compile_case(case):
    import torch
    from compile_gate import compile_kernel

    from pinet_fast.kernels import _configs
    from pinet_fast.kernels.stratum_combine import _triton

    arch, name, strata, has_rows = case
    dtype = getattr(torch, name)
    config = _configs.of_arch("stratum_combine", f"sm_{arch}", name, "all")
    return compile_kernel(
        _triton._stratum_combine_kernel,
        {"table_ptr": "*i64", "owner_ptr": "*i32", "weight_ptr": "*fp64", "scale_ptr": "*fp64"},
        _triton.launch_options(strata, dtype, dtype, True, has_rows, True, config),
        arch,
    )


if __name__ == "__main__":
    from compile_gate import run_script

    run_script(sys.argv[1:], CASES, EVERY, compile_case)
