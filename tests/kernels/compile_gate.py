"""Compiles Triton kernels for a GPU that need not be there, and looks at the machine code.

Run as a script, this file compiles every case of every op's test_gate.py (each kernel, dtype and
launch config for sm_80, sm_90 and sm_100) and compares with gates.json, which holds what each
version of Triton made of them: more registers, stack, shared memory or instructions, or fewer wide
accesses or tensor-core instructions, is a failure. ``--write`` takes what it finds as the new
baseline of this version. Exit codes: 0 as good as the baseline, 1 worse, 2 nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "gates.json"
ARCHS = (80, 90, 100)
# Fewer is better; more is better. Addresses in the code shift counts of instructions a little.
COSTS = {"registers": 1.0, "stack": 1.0, "shared": 1.0, "instructions": 1.02}
GAINS = ("vector_loads", "vector_stores", "wide_copies", "mma")
_TRITON_NAMES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}


def pointer(dtype):
    """Return Triton's name for a pointer to a torch dtype, given by name."""
    return "*" + _TRITON_NAMES[dtype]


def compile_kernel(
    kernel, pointers, scalars, arch=90, integers=(), divisible=(), num_warps=4, num_stages=3,
    maxnreg=None,
):  # fmt: skip
    """Compile a kernel for ``sm_<arch>``.

    Pointers are aligned to 16 bytes, ``integers`` are i64, ``divisible`` i32 and multiples of 16,
    as the launcher finds them for sizes and strides that are. Anything else is constant.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {**pointers, **dict.fromkeys(integers, "i64"), **dict.fromkeys(divisible, "i32")}
    constants = {name: scalars.get(name) for name in names if name not in kinds}
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *divisible)},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def describe(case, compiled, tool):
    """Return what a kernel uses, its float atomics, and how it moves data and multiplies."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def ask(*command):
            return subprocess.run(
                [*command, file.name], capture_output=True, text=True, check=True
            ).stdout

        usage = ask(tool, "-res-usage")
        code = ask(Path(tool).with_name("nvdisasm"), "-c")
    ptx = compiled.asm["ptx"]
    wide = r"\.global\S*\.(?:v4\.b32|v2\.b64)"
    return {
        "case": case,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        "atomics": re.findall(r"\b(?:red|atom)\.\S*\.b?f(?:16|32|64)\S*", ptx),
        "vector_loads": len(re.findall("ld" + wide, ptx)),
        "vector_stores": len(re.findall("st" + wide, ptx)),
        "wide_copies": len(re.findall(r"cp\.async\.cg\.\S+ .*0x10", ptx)),
        "mma": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx)),
    }


def run_script(arguments, sample, every, compile_case):
    """Be the script of a test_gate.py: print one JSON record per case.

    Args:
        arguments: Of the script: the path of cuobjdump, and ``all`` where every case is wanted.
        sample: Cases of the ordinary tests.
        every: All cases.
        compile_case: Returns the compiled kernel of a case.
    """
    tool, *rest = arguments
    for case in every if rest == ["all"] else sample:
        print(json.dumps(describe(case, compile_case(case), tool)), flush=True)


def every_record(only):
    """Compile every case in a process for each op (of ``only``); yield a name and a record each."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for script in sorted(HERE.glob("*/test_gate.py")):
        if only and script.parent.name not in only:
            continue
        done = subprocess.run(
            [sys.executable, str(script), str(tool), "all"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
                "TRITON_INTERPRET": "0",
            },
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for record in map(json.loads, done.stdout.splitlines()):
            yield f"{script.parent.name} {' '.join(map(str, record.pop('case')))}", record


def faults(record, expected):
    """Return what is wrong with a kernel, in words; ``expected`` is its record in the baseline."""
    found = []
    if record["stack"]:
        found.append(f"{record['stack']} bytes of stack")
    if record["atomics"]:
        found.append(f"float atomics {', '.join(record['atomics'])}")
    for name, slack in COSTS.items():
        if expected and record[name] > expected[name] * slack:
            found.append(f"{name} {record[name]}, was {expected[name]}")
    return found + [
        f"{name} {record[name]}, was {expected[name]}"
        for name in GAINS
        if expected and record[name] < expected[name]
    ]


def main():
    """Compile, print, compare; return the exit code."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="folders of kernels/; default all")
    parser.add_argument("--write", action="store_true", help="make this the baseline")
    given = parser.parse_args()
    baselines = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    baseline = baselines.get(triton.__version__, {})
    asked = {name: old for name, old in baseline.items() if _is_asked(name, given.ops)}
    columns = (*COSTS, *GAINS)
    print(f"{'triton ' + triton.__version__:62s}", *columns)
    records, num_bad = {}, 0
    for name, record in every_record(given.ops):
        records[name] = record
        counts = [f"{record[column]:>{len(column)}}" for column in columns]
        print(f"{name:62s}", *counts, flush=True)
        for fault in faults(record, None if given.write else asked.get(name)):
            print(f"    FAULT: {fault}")
            num_bad += 1
    if given.write:
        found = {
            name: {key: value for key, value in record.items() if key != "atomics"}
            for name, record in records.items()
        }
        kept = {name: old for name, old in baseline.items() if name not in asked}
        baselines[triton.__version__] = dict(sorted({**kept, **found}.items()))
        BASELINE.write_text(_as_json(baselines))
        return 1 if num_bad else 0
    unknown, gone = sorted(records.keys() - asked), sorted(asked.keys() - records)
    print(f"{len(records)} kernels, {num_bad} faults")
    if unknown or gone:
        print(f"not in the baseline: {unknown or 'none'}")
        print(f"in the baseline alone: {gone or 'none'}; write a new one with --write")
    return 1 if num_bad else 2 if unknown or gone else 0


def _is_asked(name, ops):
    return not ops or name.split()[0] in ops


def _as_json(baselines):
    """Return the baseline with one line per kernel, so that a diff shows what changed."""
    parts = []
    for version in sorted(baselines):
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in baselines[version].items()]
        parts.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
