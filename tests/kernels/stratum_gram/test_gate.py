"""Compiles the Triton kernels for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CASES = [("float32", 2), ("float32", 4), ("float32", 8), ("float32", 16), ("bfloat16", 8)]
CASES += [("float64", 8)]
MAX_REGISTERS = 168  # three blocks of 128 threads on a multiprocessor
MAX_SHARED_BYTES = 8192


@pytest.fixture(scope="module")
def records():
    """Return what the compiler says about every case, for sm_90."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(tool)],
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return {tuple(r["case"]): r for r in map(json.loads, done.stdout.splitlines())}


def check_budget(record):
    assert record["stack"] == 0
    assert record["registers"] <= MAX_REGISTERS
    assert record["shared"] <= MAX_SHARED_BYTES
    assert record["atomics"] == []


@pytest.mark.gate
@pytest.mark.parametrize(("dtype", "strata"), CASES)
def test_chunk_kernel_stays_within_its_budget(records, dtype, strata):
    record = records["chunk", dtype, strata]
    check_budget(record)
    assert record["vector_loads"] >= 2  # 16 bytes each: the tile, and the row it is multiplied by


@pytest.mark.gate
@pytest.mark.parametrize("strata", [2, 8, 16])
def test_fold_kernel_stays_within_its_budget(records, strata):
    check_budget(records["fold", "float64", strata])


def compile_for_sm_90(kernel, pointers, scalars):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: pointers.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in scalars.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def describe(case, compiled, tool):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = compiled.asm["ptx"]
    return {
        "case": case,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "atomics": re.findall(r"\b(?:red|atom)\.\S*\.b?f(?:16|32|64)\S*", ptx),
        "vector_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx)),
    }


def main(tool):
    import torch

    from pinet_fast.kernels.stratum_gram import _triton

    for dtype, strata in CASES:
        compiled = compile_for_sm_90(
            _triton._stratum_gram_chunk_kernel,
            {"partial_ptr": "*fp64", "table_ptr": "*i64", "owner_ptr": "*i32"},
            _triton.launch_options(strata, getattr(torch, dtype), is_aligned=True),
        )
        print(json.dumps(describe(("chunk", dtype, strata), compiled, tool)))
    for strata in (2, 8, 16):
        compiled = compile_for_sm_90(
            _triton._stratum_gram_fold_kernel,
            {"out_ptr": "*fp64", "partial_ptr": "*fp64", "first_ptr": "*i64"},
            _triton.fold_options(strata),
        )
        print(json.dumps(describe(("fold", "float64", strata), compiled, tool)))


if __name__ == "__main__":
    main(sys.argv[1])
