"""Compiles the Triton kernels for a GPU that need not be there, and looks at the machine code.

Run as a script, this file is the compiling process: it prints one JSON record per kernel.
"""

from __future__ import annotations

import sys

import pytest

DTYPES = ("float32", "float64", "bfloat16", "float16")
SAMPLE = [
    ("reduce", 90, "float32", 64),
    ("reduce", 90, "bfloat16", 128),
    ("add", 90, "float32", 64),
    ("slots", 90, "float32", 64),
    ("long", 90, "float32", 64),
    ("reduce", 80, "float32", 64),
    ("add", 100, "float32", 256),
]
EVERY = [
    (kind, arch, dtype, 64)
    for kind in ("reduce", "add", "slots", "long")
    for arch in (80, 90, 100)
    for dtype in DTYPES
]
MAX_REGISTERS = 96  # five blocks of 128 threads on a multiprocessor
MAX_SHARED_BYTES = 8192


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
    if case[0] != "long":
        assert record["vector_loads"] >= 1  # 16 bytes each
    if case[0] in ("reduce", "add"):
        assert record["vector_stores"] >= 1


def compile_case(case):
    import torch
    from compile_gate import compile_kernel, pointer

    from pinet_fast.kernels import _configs
    from pinet_fast.kernels.stratified_embedding import _triton

    kind, arch, name, width = case
    dtype = getattr(torch, name)
    config = _configs.of_arch("stratified_embedding", f"sm_{arch}", name, "all")
    options = _triton.launch_options(width, dtype, True, config)
    wide = pointer("float64" if dtype is torch.float64 else "float32")
    kernel = {"slots": _triton._slots_kernel, "long": _triton._long_cells_kernel}.get(
        kind, _triton._cells_kernel
    )
    constants = options["cells" if kind in ("reduce", "add") else kind]
    kinds = {
        "out_ptr": pointer(name), "touched_ptr": "*u8", "keys_ptr": "*i32", "begin_ptr": "*i64",
        "end_ptr": "*i64", "order_ptr": "*i64", "lists_ptr": "*i64", "slots_ptr": wide,
        "place_ptr": "*i64",
    }  # fmt: skip
    unused = {"reduce": ("keys_ptr",), "add": ("touched_ptr",)}.get(kind, ())
    pointers = {k: v for k, v in kinds.items() if k in kernel.arg_names and k not in unused}
    scalars = {**constants, "S": 8, "IS_ADD": kind == "add", "num_touched": 0}
    strides = ("stride_s", "stride_v")
    integers = [n for n in ("num_cells", "num_lists", "num_entries") if n in kernel.arg_names]
    divisible = [n for n in ("width", *strides) if n in kernel.arg_names]
    if kind == "reduce":
        integers.append("num_touched")
    return compile_kernel(
        kernel,
        pointers,
        scalars,
        arch,
        integers=integers,
        divisible=divisible,
        num_warps=config["num_warps"],
    )


if __name__ == "__main__":
    from compile_gate import run_script

    run_script(sys.argv[1:], SAMPLE, EVERY, compile_case)
