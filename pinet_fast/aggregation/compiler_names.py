"""The private names of torch's compiler that graphs with strata need, in one place.

torch promises none of them. Where one is missing, compiled models run eagerly inside ``stratify``:
as exact, only slower.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

FRAME_CALLBACK = "torch._C._dynamo.eval_frame:get_eval_frame_callback"
NEEDED = (
    "torch._dynamo:disable",
    "torch._dynamo:graph_break",
    "torch._dynamo:mark_static",
    "torch._dynamo.eval_frame:skip_code",
    "torch._dynamo.variables.torch:get_overridable_functions",
    FRAME_CALLBACK,
    "torch._functorch.config:donated_buffer",
)
"""As ``pkgutil.resolve_name`` takes them; a test compares them with what the code uses."""


STANCES = ("torch._dynamo.eval_frame:_stance", "torch._dynamo.eval_frame:DynamoStance")
"""Where a torch lacks one of these, its public ``set_stance`` serves, at thirty times the cost."""


@functools.cache
def can_trace() -> bool:
    """Return whether this torch has all the names; where it lacks some, warn, once a process."""
    missing = [name.replace(":", ".") for name in NEEDED if not _is_there(name)]
    if missing:
        warnings.warn(
            f"compiled models run eagerly inside stratify: torch {torch.__version__} has no "
            f"{', '.join(missing)}, which graphs with strata are made with; gradients are the "
            "same, steps are slower; pip install 'torch==2.13.*' has them",
            stacklevel=3,
        )
    return not missing


@functools.cache
def frame_callback() -> Callable[[], object] | None:
    """Return what tells whether frames are being compiled now; None where torch lacks it."""
    if not _is_there(FRAME_CALLBACK):
        return None
    found: Callable[[], object] = pkgutil.resolve_name(FRAME_CALLBACK)
    return found


class _EagerStance:
    """The stance ``force_eager`` while entered, without the calls of torch's own context.

    Those ask whether a frame is being compiled now; ``refuse_compiled_step`` has asked it.

    Args:
        frames: The module whose global it is.
        eager: The stance.
    """

    def __init__(self, frames: Any, eager: object) -> None:
        self._frames, self._eager = frames, eager
        self._before: list[object] = []

    def __enter__(self) -> None:
        self._before.append(self._frames._stance)
        self._frames._stance = self._eager

    def __exit__(self, *error: object) -> None:
        self._frames._stance = self._before.pop()


def eager_stance() -> AbstractContextManager[None]:
    """Return a context in which what is compiled runs eagerly."""
    found = _quick_stance()
    if found is None:
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return stance
    return found


@functools.cache
def _quick_stance() -> _EagerStance | None:
    if not all(map(_is_there, STANCES)):
        return None
    kind = pkgutil.resolve_name(STANCES[1])
    return _EagerStance(sys.modules[kind.__module__], kind("force_eager"))


def _is_there(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
