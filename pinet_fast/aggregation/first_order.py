"""Backwards that have no backward of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backward as torch's ``once_differentiable`` does, without its cost in a plain one.

    That decorator switches gradients off around every call, nine Python calls. The engine has them
    off already unless gradients of gradients are asked for.
    """
    guarded = once_differentiable(backward)

    def run(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            return guarded(ctx, *grads)
        return backward(ctx, *grads)

    return run
