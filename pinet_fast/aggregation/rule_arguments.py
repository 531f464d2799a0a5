"""What boundary rules make of the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from pinet_fast.aggregation.leaves import Root

Func = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def detached(value: Tensor | None, root: Root | None) -> Tensor | None:
    """Keep a parameter out of the graph; leave other tensors in it, with their own gradient."""
    return value if root is None else root.detached()


def autocast(*tensors: Any) -> list[Any]:
    """Return tensors as autocast casts them before a matrix product; None stays None.

    Done outside the op, so that its backward runs in the dtypes that it saved, as torch's does.
    """
    if not torch._C._is_any_autocast_enabled():
        return list(tensors)
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    ]


def bind(signature: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Bind call arguments to a signature; functions of torch have none to inspect.

    Args:
        signature: Takes what the function of torch takes, and returns what the rule wants of it.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        BoundaryError: An argument that the boundary op does not know.
    """
    try:
        return signature(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*(type(a).__name__ for a in args), *(f"{k}=" for k in kwargs)])
        raise BoundaryError(
            f"arguments ({given}) are not supported at a boundary: {error}; leave out what is not "
            'known, or use GradientAggregator(..., mode="exact")'
        ) from error
