"""The backends of this machine."""

from __future__ import annotations

import pytest

from pinet_fast.kernels import _registry


@pytest.fixture(params=["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
def backend(request):
    """Return a backend for CPU tensors."""
    (found,) = [b for b in _registry.backends("dropout_mask") if b.name == request.param]
    if reason := found.probe():
        pytest.skip(f"{found.name}: {reason}")
    return found
