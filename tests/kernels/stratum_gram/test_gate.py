"""Compiles the Triton kernels for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import json
import sys

import pytest

CHUNK_CASES = [
    *((90, "float32", strata) for strata in (2, 4, 8, 16)),
    *((90, dtype, 8) for dtype in ("bfloat16", "float64")),
    *((arch, "float32", strata) for arch in (80, 100) for strata in (8, 16)),
]
FOLD_CASES = [(90, 2), (90, 8), (90, 16), (80, 16), (100, 16)]
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


def main(tool):
    import torch
    from compile_gate import compile_kernel, describe

    from pinet_fast.kernels.stratum_gram import _triton

    for arch, dtype, strata in CHUNK_CASES:
        kernel = compile_kernel(
            _triton._stratum_gram_chunk_kernel,
            {"partial_ptr": "*fp64", "table_ptr": "*i64", "owner_ptr": "*i32"},
            _triton.launch_options(strata, getattr(torch, dtype), is_aligned=True),
            arch,
        )
        print(json.dumps(describe(("chunk", arch, dtype, strata), kernel, tool)))
    for arch, strata in FOLD_CASES:
        kernel = compile_kernel(
            _triton._stratum_gram_fold_kernel,
            {"out_ptr": "*fp64", "partial_ptr": "*fp64", "first_ptr": "*i64"},
            _triton.fold_options(strata),
            arch,
        )
        print(json.dumps(describe(("fold", arch, strata), kernel, tool)))


if __name__ == "__main__":
    main(sys.argv[1])
