"""A mark for work whose rows belong to no user, for models that do not know who trains them.

The mark travels the way that calls of torch functions do: to the interception that is active in
this thread, if there is one, through any other modes in between. So no state is global.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch.overrides import handle_torch_function, has_torch_function

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOBODY = (object(),)  # a mode sees calls that have arguments to look at

_num_inside = 0  # of shared() in any thread; only tells that nothing is hidden


@contextmanager
def shared() -> Iterator[None]:
    """Mark work whose rows belong to no user, inside a model; as ``GradientAggregator.shared()``.

    Outside ``stratify``, under constant rules and in exact mode it changes nothing, so a model that
    uses it trains and serves like any other. What is computed inside counts as computed from
    parameters alone: its gradient belongs to the stratum whose loss used it.

    Example::

        def forward(self, batch):
            users = self.encode(batch)                     # [B, d]
            with pinet_fast.shared():
                pool = self.items(batch.pool)              # [n, d], candidates of everybody
            return losses_of(users @ pool.T, batch)        # [B]
    """
    if torch.compiler.is_compiling():  # under rules that intercept, shared work is never compiled
        yield
        return
    global _num_inside
    before = set_shared(True)
    _num_inside += 1
    try:
        yield
    finally:
        _num_inside -= 1
        set_shared(before)


def rows_alone() -> AbstractContextManager[None]:
    """Hide calls in which no parameter takes part from torch-function modes.

    A mode costs every call 1 to 4 us, and those of small steps add up. For the inside of models:
    where a parameter took part, its gradient would be refused. Inside ``shared()`` all is seen.
    """
    if _num_inside or torch.compiler.is_compiling():
        return nullcontext()
    return torch._C.DisableTorchFunction()


def set_shared(value: bool) -> bool:
    """Tell the active interception, if there is one; return what was set before."""
    if has_torch_function(_NOBODY):
        return bool(handle_torch_function(set_shared, _NOBODY, value))
    return False
