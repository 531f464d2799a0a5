"""Compiles the Triton kernel for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import sys

import pytest

RULES = ("agreement", "balanced", "mgda", "pcgrad", "imtlg", "alignedmtl", "cagrad")
CASES = [
    *((90, rule, strata) for rule in RULES for strata in (2, 16)),
    (90, "mgda", 32),
    (80, "mgda", 8),
    (100, "mgda", 8),
]
EVERY = [(arch, rule, strata) for arch in (80, 90, 100) for rule in RULES for strata in (8, 32)]
MAX_REGISTERS = 255  # one warp a block: registers do not limit anything but spilling
MAX_SHARED_BYTES = 16384


@pytest.fixture(scope="module")
def records(compiled):
    """Return what the compiler says about every case."""
    return compiled(__file__)


@pytest.mark.gate
@pytest.mark.parametrize(("arch", "rule", "strata"), CASES)
def test_kernel_stays_within_its_budget(records, arch, rule, strata):
    record = records[arch, rule, strata]
    assert record["stack"] == 0
    assert record["registers"] <= MAX_REGISTERS
    assert record["shared"] <= MAX_SHARED_BYTES
    assert record["atomics"] == []


def compile_case(case):
    from compile_gate import compile_kernel

    from pinet_fast.kernels.stratum_solve import _triton

    arch, rule, strata = case
    return compile_kernel(
        _triton._stratum_solve_kernel,
        {"out_ptr": "*fp64", "gram_ptr": "*fp64", "keys_ptr": "*fp64"},
        _triton.launch_options(rule, strata, has_keys=rule == "pcgrad"),
        arch,
        integers=("mask", "count"),
        num_warps=_triton.num_warps(strata),
        maxnreg=_triton.MAX_REGISTERS,
    )


if __name__ == "__main__":
    from compile_gate import run_script

    run_script(sys.argv[1:], CASES, EVERY, compile_case)
