"""The dispatcher namespace of all ops, and the compiled library behind the ``cpp`` backends."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

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


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether nobody looks on, so that an op may skip the dispatcher.

    An op that is written in Python costs 10 us on its way through it. Compilers, dispatch modes,
    transforms, profilers and subclasses of tensors have to see the op.
    """
    return (
        type(tensor) in _PLAIN
        and not torch.compiler.is_compiling()
        and tensor.device.type in ("cpu", "cuda")
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # is_grads_batched
        and not torch._C._autograd._profiler_enabled()
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


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
