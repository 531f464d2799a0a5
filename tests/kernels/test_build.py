from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# A Gram, its weights, and the combination, on the backend that is asked for.
EVERY_OP = """
import torch, pinet_fast.kernels as k
print(k.__file__)
grads = [torch.tensor([[1., 2.], [2., 1.]])]
gram = k.stratum_gram(grads, backend={backend!r})
weights = k.stratum_solve(gram.sum(0), "mgda", backend={backend!r})
out = torch.full((2,), torch.nan)
k.stratum_combine(grads, weights, [out], backend={backend!r})
assert k.stratum_sums(grads[0], torch.tensor([0, 0]), 1, backend={backend!r}).tolist() == [[3, 3]]
norm = [torch.ones(2, 2), grads[0], torch.tensor([1.5, 1.5]), torch.tensor([2., 2.]), None]
norm = k.stratified_norm_backward(*norm, torch.tensor([1, 0]), 2, backend={backend!r})
assert norm[1].tolist() == [[1, -1], [-1, 1]]
heads = k.routed_linear(grads[0], torch.ones(2, 1, 2), None, torch.tensor([0, 1]), (0, 1, 2),
                        backend={backend!r})
assert heads.tolist() == [[3], [3]]
qkv = torch.ones(2, 3, 1, 4)
attended = k.ragged_attention(qkv, torch.tensor([0, 2]), backend={backend!r})
assert attended.tolist() == [[[1] * 4]] * 2
print(gram.tolist(), weights.tolist(), out.tolist())
"""
RESULT = "[[[5.0, 4.0], [4.0, 5.0]]] [0.5, 0.5] [1.5, 1.5]"


def test_bare_checkout_runs_on_the_reference_backend(bare_checkout, run_isolated):
    code = EVERY_OP.format(backend=None) + "print(k.describe_status())"
    where, value, status = run_isolated(bare_checkout, code).splitlines()
    assert Path(where).parent == bare_checkout / "kernels"
    assert value == RESULT
    assert status.startswith("kernels: reference serves (cpp: no compiled library; install a C++")


def test_status_command_prints_one_line(bare_checkout, run_isolated):
    code = "import runpy; runpy.run_module('pinet_fast.kernels', run_name='__main__')"
    (line,) = run_isolated(bare_checkout, code).splitlines()
    assert line.startswith("kernels: ")


@pytest.fixture
def sources(root, tmp_path):
    """Return a copy of everything that a wheel is built from."""
    folder = tmp_path / "sources"
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("pinet_fast", "kernels"):
        shutil.copytree(root / name, folder / name, ignore=skip)
    for name in ("pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(root / name, folder)
    (folder / "README.md").write_text("# pinet_fast\n")
    return folder


def build_wheel(folder, env):
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-v"]
    shutil.rmtree(folder / "wheels", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *flags, ".", "-w", "wheels"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = (folder / "wheels").glob("*.whl")
    return zipfile.ZipFile(wheel), done.stdout + done.stderr


def build_tools():
    for module in ("scikit_build_core", "cmake", "ninja"):
        pytest.importorskip(module, reason=f"a wheel cannot be built without {module}")


def has_compiler():
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


@pytest.mark.slow
def test_wheel_without_a_compiler_holds_the_kernels_and_no_library(sources, tmp_path):
    build_tools()
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        (tools / tool).symlink_to(Path(sys.executable).with_name(tool))
    # CMake looks into /usr/bin whatever the path says; a CXX that is not there stops it.
    env = dict(os.environ) | {"PATH": str(tools), "CXX": str(tools / "c++"), "CC": "no-cc"}
    wheel, log = build_wheel(sources, env)
    names = wheel.namelist()
    assert "no C++ compiler was found" in log
    ops = {"stratum_gram", "stratum_solve", "stratum_combine", "stratum_sums"}
    ops |= {"stratified_norm", "stratified_embedding", "routed_linear", "ragged_attention"}
    for op in ops:
        assert f"pinet_fast/kernels/{op}/op.py" in names
    tables = sorted(path.name for path in (sources / "kernels/configs").glob("*.json"))
    assert len(tables) >= 7
    for table in tables:
        assert f"pinet_fast/kernels/configs/{table}" in names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".h"))]
    if has_compiler():  # installed later, and the build folder still there
        wheel, _ = build_wheel(sources, dict(os.environ))
        assert "pinet_fast/_C.so" in wheel.namelist()


@pytest.mark.slow
@pytest.mark.cpp
def test_installed_wheel_serves_with_the_library(sources, tmp_path, run_isolated):
    build_tools()
    if not has_compiler():
        pytest.skip("no C++ compiler")
    wheel, _ = build_wheel(sources, dict(os.environ))
    assert "pinet_fast/_C.so" in wheel.namelist()
    site = tmp_path / "site"
    wheel.extractall(site)
    where, value = run_isolated(site, EVERY_OP.format(backend="cpp")).splitlines()
    assert Path(where).parent == site / "pinet_fast" / "kernels"
    assert value == RESULT
