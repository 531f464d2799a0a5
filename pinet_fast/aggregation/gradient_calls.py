"""Calls into the autograd engine, and what the forward's interception must know of them.

Activation checkpointing recomputes parts of the forward inside the engine. There the interception
has to be active again, in replay: the recomputed ops must save what the first ones did, and their
virtual leaves go nowhere. It costs every call of the backward, so it happens only where the forward
saw hooks on saved tensors.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast.aggregation.composites import opened
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pinet_fast.aggregation.interception import Interception

GRADIENT_CALLS: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.backward, torch.autograd.backward, torch.autograd.grad}
)
"""Functions that run the engine and that a torch-function mode sees."""


def is_recording_hooks() -> bool:
    """Return whether saved tensors are handed to hooks now, as activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def reentrant_error() -> AggregationError:
    """Return the error for reentrant activation checkpointing."""
    return AggregationError(
        "backward: reentrant activation checkpointing runs a backward of its own inside the "
        "backward, and its strata cannot be told apart; use "
        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    )


def refuse_backward() -> None:
    """Refuse a backward that is not the aggregator's.

    Raises:
        AggregationError: Always.
    """
    raise AggregationError(
        "backward: the losses were computed inside stratify, and nothing says how this scalar was "
        "reduced; call opt.backward(losses) with one loss a user or an event, or say "
        'stratify(strata, reduction="mean") where it is a mean over all rows'
    )


@contextmanager
def replay(mode: Interception | None) -> Iterator[None]:
    """Run the engine inside; recomputed parts of the forward are intercepted again.

    Raises:
        AggregationError: The checkpointing is of the reentrant kind.
    """
    try:
        if mode is None or not mode.saw_hooks:
            yield
        else:
            with torch._C._EnableTorchFunction(), mode.replaying(), mode:
                yield
    except RuntimeError as error:
        if "use_reentrant=True" in str(error):  # torch's own, of the leak check's gradients
            raise reentrant_error() from error
        raise


def run_in_replay(
    mode: Interception, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a gradient call that the mode saw inside its ``with``.

    Raises:
        AggregationError: Its losses hold rows of the batch, and nothing says how they were reduced.
    """
    create_graph = kwargs.get("create_graph") or _positional_create_graph(func, args)
    outputs = args[0] if args else kwargs.get("outputs", kwargs.get("tensors"))
    holds_rows = any(
        isinstance(t, Tensor) and mode.carries_rows(t)
        for t in (outputs if isinstance(outputs, list | tuple) else (outputs,))
    )
    if holds_rows and not mode.is_replaying:
        _check_allowed(mode, func, bool(create_graph))
    if not mode.saw_hooks:
        return func(*args, **kwargs)
    with mode.replaying(), mode:
        return opened(func)(*args, **kwargs)


def _positional_create_graph(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    place = 4 if func is torch.autograd.grad else 3
    return len(args) > place and bool(args[place])


def _check_allowed(mode: Interception, func: Callable[..., Any], create_graph: bool) -> None:
    name = func.__name__
    if create_graph:
        raise AggregationError(
            f"{name}(create_graph=True): gradients of gradients cannot be told apart by stratum; "
            'drop the gradient penalty, or use GradientAggregator(..., mode="exact")'
        )
    if not mode.takes_scalars and func is not torch.autograd.grad:
        raise AggregationError(
            f"{name}: the losses were computed inside stratify, and nothing says how the scalar "
            "was reduced; call opt.backward(losses) with one loss a user or an event, or say "
            'stratify(strata, reduction="mean") where the scalar is a mean over all rows'
        )
