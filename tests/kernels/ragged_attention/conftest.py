"""The cases module, importable under importlib mode, and the backends of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pinet_fast.kernels import _registry

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
def backend(request):
    """Return a backend for CPU tensors."""
    (found,) = [b for b in _registry.backends("ragged_attention") if b.name == request.param]
    if reason := found.probe():
        pytest.skip(f"{found.name}: {reason}")
    return found
