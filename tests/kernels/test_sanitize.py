"""The C++ kernels and the lane under AddressSanitizer and UBSan, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from pinet_fast.aggregation import lane

HERE = Path(__file__).resolve().parent
FLAGS = ["-g", "-O1", "-fno-omit-frame-pointer", "-fPIC", "-shared"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Sanitizers watch what the kernels do, so the contracts of every op against its oracle are enough.
TESTS = sorted(str(path) for path in HERE.glob("*/test_backends.py"))
# These reserve 8 GiB, an eighth of which the sanitizer would write.
LEFT_OUT = "not addresses_beyond_int32"
LANE_TESTS = [
    str(HERE.parent / "aggregation" / f"test_{name}.py")
    for name in ("lane_native", "lane_direct", "lane_shared_leaves", "compiled_functions")
]
LANE = "_lane_" + "_".join(torch.__version__.split(".")[:2])


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


def build(command, options, library, *libraries):
    root = Path(torch.__file__).parent
    command = [*command, "-o", str(library), *options, "-isystem", str(root / "include")]
    command += ["-L", str(root / "lib"), "-ltorch_cpu", *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def sanitized(bare_checkout, compiler, runtime):
    """Return a checkout whose compiled library has the sanitizers in it."""
    sources = sorted(str(p) for p in (bare_checkout / "kernels").rglob("csrc/*.cpp"))
    library = bare_checkout / "pinet_fast" / "_C.so"
    build(
        [compiler, *FLAGS, "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", *sources],
        ["-I", str(bare_checkout / "kernels" / "csrc")],
        library,
    )
    yield bare_checkout
    library.unlink()


@pytest.fixture(scope="module")
def sanitized_lane(request, compiler):
    """Return that checkout with the lane in it, built the same way."""
    if (reason := lane.refusal()) is not None:
        pytest.skip(f"no compiled lane: {reason}")
    if not os.environ.get("SANITIZE_LANE"):
        pytest.skip("takes three minutes to build; make sanitize runs it")
    sanitized = request.getfixturevalue("sanitized")
    library = sanitized / "pinet_fast" / (LANE + sysconfig.get_config_var("EXT_SUFFIX"))
    sources = sorted(str(p) for p in (sanitized / "pinet_fast").rglob("csrc/*.cpp"))
    api = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "api" / "include"
    # The check of virtual tables needs type information that torch does not export.
    build(
        [compiler, *FLAGS, "-fno-sanitize=vptr", "-std=c++20", *sources],
        [f"-DPINET_LANE_INIT=PyInit_{LANE}", f"-I{api}", f"-I{sysconfig.get_path('include')}"],
        library,
        "-ltorch_python",
        "-lc10",
    )
    yield sanitized
    library.unlink()


def run_tests(run_isolated, checkout, runtime, arguments, **env):
    arguments = [*arguments, "-v", "-s", "-p", "no:cacheprovider"]
    arguments += ["-o", "addopts=--import-mode=importlib --benchmark-disable"]
    arguments += ["-o", "pythonpath=tests"]  # not the root: it would hide the sanitized checkout
    code = f"import sys, pytest; sys.exit(pytest.main({arguments!r}))"
    printed = run_isolated(
        checkout,
        code,
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0",  # Python and torch never free what they keep
        UBSAN_OPTIONS="print_stacktrace=1",
        **env,
    )
    assert " passed" in printed
    assert "skipped" not in printed.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.cpp
def test_kernels_touch_nothing_that_is_not_theirs(sanitized, runtime, run_isolated):
    run_tests(run_isolated, sanitized, runtime, [*TESTS, "-k", f"cpp and {LEFT_OUT}"])


@pytest.mark.slow
@pytest.mark.cpp
def test_the_lane_touches_nothing_that_is_not_its_own(sanitized_lane, runtime, run_isolated):
    # Python's own allocator would hide from the sanitizer which objects are freed.
    run_tests(run_isolated, sanitized_lane, runtime, LANE_TESTS, PYTHONMALLOC="malloc")
