"""Compiles the Triton kernel for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import json
import sys

import pytest

CASES = [
    *((90, "float32", strata, False) for strata in (2, 4, 8, 16)),
    *((90, dtype, 8, False) for dtype in ("bfloat16", "float64")),
    (90, "float32", 8, True),
    *((arch, "float32", 8, False) for arch in (80, 100)),
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


def main(tool):
    import torch
    from compile_gate import compile_kernel, describe

    from pinet_fast.kernels.stratum_combine import _triton

    for arch, name, strata, has_rows in CASES:
        dtype = getattr(torch, name)
        kernel = compile_kernel(
            _triton._stratum_combine_kernel,
            {
                "table_ptr": "*i64",
                "owner_ptr": "*i32",
                "weight_ptr": "*fp64",
                "scale_ptr": "*fp64",
            },
            _triton.launch_options(strata, dtype, dtype, True, has_rows, is_aligned=True),
            arch,
        )
        print(json.dumps(describe((arch, name, strata, has_rows), kernel, tool)))


if __name__ == "__main__":
    main(sys.argv[1])
