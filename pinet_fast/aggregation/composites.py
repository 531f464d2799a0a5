"""Composite torch functions, opened: their own code runs with the interception inside.

Some functions of torch are Python code over functions that have boundary rules. Handed whole to
the mode they would need a rule of their own; opened, their parts meet the rules they have, and the
forward is torch's own, bit for bit.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

OPENED: frozenset[Callable[..., Any]] = frozenset({F.multi_head_attention_forward})
"""Functions that are opened."""


@functools.cache
def opened(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``func`` without its own hand-over to torch-function modes; its parts keep theirs."""
    code = getattr(func, "__code__", None)
    if not isinstance(func, types.FunctionType) or code is None:
        raise TypeError(f"{func} is no Python function")
    never = {
        name: lambda *args: False
        for name in (
            "has_torch_function",
            "has_torch_function_unary",
            "has_torch_function_variadic",
        )
    }
    return types.FunctionType(
        code, {**func.__globals__, **never}, func.__name__, func.__defaults__, func.__closure__
    )
