"""Fixtures of the kernel tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # for compile_gate


@pytest.fixture(scope="session")
def root():
    """Return the root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def bare_checkout(tmp_path_factory):
    """Return a copy of the Python sources alone, as an archive of the repository gives them."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pinet_fast", "kernels"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        )
    return folder


@pytest.fixture(scope="session")
def run_isolated():
    """Return a function that runs code with a folder and the installed packages on the path.

    ``-S`` leaves out the hooks of editable installs, so that only ``folder`` gives pinet_fast.
    """

    def run(folder, code, **env):
        paths = [str(folder), sysconfig.get_path("purelib")]
        code = f"import sys; sys.path[:0] = {paths!r}\n{code}"
        return run_python(["-S", "-c", code], folder, env)

    return run


def run_python(arguments, folder, env):
    """Run this interpreter; return what it printed, fail with its errors."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PINET_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def interpreted():
    """Return a function that runs a test file as a script in Triton's interpreter.

    Triton decides when a kernel is decorated whether it is interpreted, so the variable must be set
    before the import. The script prints the names of the checks that passed.
    """

    def run(path):
        pytest.importorskip("triton", reason="triton is not installed")
        path = Path(path).resolve()
        env = {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(path.parent), str(HERE)]),
        }
        return run_python([str(path)], path.parent, env).split()

    return run


@pytest.fixture(scope="session")
def compiled():
    """Return a function that runs a test file as a script that compiles Triton kernels.

    The script gets the path of cuobjdump and prints one JSON record per kernel; the function
    returns them by their ``case``.
    """

    def run(path):
        triton = pytest.importorskip("triton", reason="triton is not installed")
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not tool.exists():
            pytest.skip("this triton has no cuobjdump")
        path = Path(path).resolve()
        printed = run_python([str(path), str(tool)], path.parent, {"PYTHONPATH": str(HERE)})
        return {tuple(r["case"]): r for r in map(json.loads, printed.splitlines())}

    return run
