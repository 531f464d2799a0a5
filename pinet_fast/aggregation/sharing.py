"""A mark for work whose rows belong to no user, for models that do not know who trains them.

The mark travels the way that calls of torch functions do: to the interception that is active in
this thread, if there is one, through any other modes in between. So no state is global.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.overrides import handle_torch_function, has_torch_function

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOBODY = (object(),)  # a mode sees calls that have arguments to look at


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
    before = set_shared(True)
    try:
        yield
    finally:
        set_shared(before)


def set_shared(value: bool) -> bool:
    """Tell the active interception, if there is one; return what was set before."""
    if has_torch_function(_NOBODY):
        return bool(handle_torch_function(set_shared, _NOBODY, value))
    return False
