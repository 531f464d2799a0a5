"""Compiles Triton kernels for a GPU that need not be there, and looks at the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile

ARCHITECTURES = (80, 90, 100)


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
