"""The C++ kernels under AddressSanitizer and UBSan, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-g", "-O1", "-fno-omit-frame-pointer", "-fPIC", "-shared"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Sanitizers watch what the kernels do, so the contracts of every op against its oracle are enough.
TESTS = sorted(str(path) for path in HERE.glob("*/test_backends.py"))
# These reserve 8 GiB, an eighth of which the sanitizer would write.
LEFT_OUT = "not addresses_beyond_int32"


@pytest.fixture(scope="module")
def compiler():
    found = next((c for c in (os.environ.get("CXX"), "g++") if c and shutil.which(c)), None)
    if found is None or sys.platform != "linux":
        pytest.skip("no GNU compiler on Linux")
    return found


@pytest.fixture(scope="module")
def runtime(compiler):
    """Return the libraries that must be in the process before everything else.

    The sanitizer's, and that of C++, where it looks for what throws exceptions.
    """
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler, f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        if not (path := Path(done.stdout.strip())).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        found.append(str(path))
    return ":".join(found)


@pytest.fixture(scope="module")
def sanitized(bare_checkout, compiler, runtime):
    """Return a checkout whose compiled library has the sanitizers in it."""
    torch_root = Path(torch.__file__).parent
    sources = sorted(str(p) for p in (bare_checkout / "kernels").rglob("csrc/*.cpp"))
    library = bare_checkout / "pinet_fast" / "_C.so"
    command = [
        compiler, *FLAGS, *sources, "-o", str(library),
        "-I", str(bare_checkout / "kernels" / "csrc"), "-isystem", str(torch_root / "include"),
        "-L", str(torch_root / "lib"), "-ltorch_cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    yield bare_checkout
    library.unlink()


@pytest.mark.slow
@pytest.mark.cpp
def test_kernels_touch_nothing_that_is_not_theirs(sanitized, runtime, run_isolated):
    arguments = [*TESTS, "-v", "-s", "-k", f"cpp and {LEFT_OUT}", "-p", "no:cacheprovider"]
    arguments += ["-o", "addopts=--import-mode=importlib --benchmark-disable"]
    arguments += ["-o", "pythonpath=tests"]  # not the root: it would hide the sanitized checkout
    code = f"import sys, pytest; sys.exit(pytest.main({arguments!r}))"
    printed = run_isolated(
        sanitized,
        code,
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0",  # Python and torch never free what they keep
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    assert " passed" in printed
    assert "skipped" not in printed.splitlines()[-1]
