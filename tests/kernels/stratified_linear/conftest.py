"""The cases module, importable under importlib mode, and the backends of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pinet_fast.kernels import _registry
from pinet_fast.kernels.stratified_linear import _cpp

sys.path.insert(0, str(Path(__file__).parent))


# The C++ backend has two kernels, of which the processor decides: both are tested on every one.
CPP = [pytest.param(name, marks=pytest.mark.cpp) for name in ("cpp by BLAS", "cpp fused")]


@pytest.fixture(params=["reference", *CPP])
def backend(request, monkeypatch):
    """Return a backend for CPU tensors."""
    name, _, kernel = request.param.partition(" ")
    (found,) = [b for b in _registry.backends("stratified_linear_backward") if b.name == name]
    if reason := found.probe():
        pytest.skip(f"{name}: {reason}")
    monkeypatch.setattr(_cpp, "has_tuned_blas", lambda: kernel != "fused")
    return found
