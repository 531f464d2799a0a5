"""The dispatcher namespace of all ops, and the compiled library behind the ``cpp`` backends."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

NAMESPACE = torch.library.Library("pinet", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Every op defines its schema and registers its Python kernels here.

``define`` and ``impl`` cost 2 us per call where ``torch.library.custom_op`` costs 8.
"""

_REBUILD = "run make install again"


def without_graph(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a kernel such that autograd records nothing.

    In a backward it records nothing anyway, and ``torch.no_grad`` would cost seven Python calls.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    with torch.no_grad():
        return function(*arguments)


@functools.cache
def library_refusal() -> str | None:
    """Load the compiled library, once; return None, or the reason why there is none."""
    # In an editable install the library does not lie beside this file, hence the finder.
    spec = importlib.util.find_spec("pinet_fast._C")
    if spec is None or spec.origin is None:
        return f"no compiled library; install a C++ compiler and {_REBUILD}"
    try:
        torch.ops.load_library(spec.origin)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the compiled library does not load ({error}); {_REBUILD}"
    return None


@functools.cache
def cpp_probe(op: str) -> str | None:
    """Return None if the compiled library has an op, else the reason why it cannot serve."""
    if reason := library_refusal():
        return reason
    if not hasattr(torch.ops.pinet_cpp, op):
        return f"the compiled library is older than {op}; {_REBUILD}"
    return None
