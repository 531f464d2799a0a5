"""Compiles Triton kernels for a GPU that need not be there, and looks at the machine code.

Run as a script, this file compiles every case of every op's test_gate.py and prints a table;
``--out FILE.json`` writes the same records, with the compiler's version, for comparison.
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


def compile_kernel(kernel, pointers, scalars, arch=90, integers=(), num_warps=4):
    """Compile a kernel for ``sm_<arch>``; pointers are aligned to 16 bytes, integers are i64."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {**pointers, **dict.fromkeys(integers, "i64")}
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in scalars.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def describe(case, compiled, tool):
    """Return registers, stack, shared memory, float atomics and wide accesses of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = compiled.asm["ptx"]
    wide = r"\.global\S*\.(?:v4\.b32|v2\.b64)"
    return {
        "case": case,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "atomics": re.findall(r"\b(?:red|atom)\.\S*\.b?f(?:16|32|64)\S*", ptx),
        "vector_loads": len(re.findall("ld" + wide, ptx)),
        "vector_stores": len(re.findall("st" + wide, ptx)),
    }


def every_record():
    """Compile every case of every op in processes of their own; return one record per kernel."""
    import triton

    here = Path(__file__).resolve().parent
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    records = []
    for script in sorted(here.glob("*/test_gate.py")):
        done = subprocess.run(
            [sys.executable, str(script), str(tool)],
            env={**os.environ, "PYTHONPATH": str(here), "TRITON_INTERPRET": "0"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        records += [{"op": script.parent.name, **json.loads(line)} for line in lines]
    return triton.__version__, records


def main():
    """Print the table of all kernels, and write the records where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    out = parser.parse_args().out
    version, records = every_record()
    columns = ("registers", "stack", "shared", "vector_loads", "vector_stores")
    print(f"triton {version}; {'kernel':46s}", *columns, "float_atomics")
    for record in records:
        kernel = f"{record['op']} {' '.join(map(str, record['case']))}"
        counts = [f"{record[column]:>{len(column)}}" for column in columns]
        print(f"{kernel:60s}", *counts, len(record["atomics"]))
    if out:
        out.write_text(json.dumps({"triton": version, "kernels": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
