"""Says which kernels are being compiled: the first batch on a machine waits for it.

Numba keeps what it compiled, so this happens once a machine and version. Where stderr is a terminal
a line for every kernel goes there; ``told`` sends the lines elsewhere.
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from numba.core import event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PACKAGE = __package__.partition(".")[0] + "."


class CompileNotes(event.Listener):
    """Tells of every kernel of this package when its compilation begins.

    Kernels that others call are compiled inside these, and are not named.
    """

    def __init__(self) -> None:
        self.tell: Callable[[str], None] = _to_terminal
        self._nesting = threading.local()

    def on_start(self, event: Any) -> None:
        """Name the kernel, unless it belongs to one that was named already."""
        depth = getattr(self._nesting, "depth", 0)
        self._nesting.depth = depth + 1
        function = event.data["dispatcher"].py_func
        if depth == 0 and function.__module__.startswith(_PACKAGE):
            name = function.__name__.lstrip("_")
            self.tell(f"compiling the kernel {name}, once on this machine; Numba keeps it")

    def on_end(self, event: Any) -> None:
        """Leave the kernel."""
        self._nesting.depth -= 1


@contextmanager
def told(tell: Callable[[str], None]) -> Iterator[None]:
    """Send the notes of the block to a function.

    Args:
        tell: Called with a line for every kernel that has to be compiled.
    """
    before, notes.tell = notes.tell, tell
    try:
        yield
    finally:
        notes.tell = before


def _to_terminal(text: str) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"pinet_fast: {text}", file=sys.stderr, flush=True)


notes = CompileNotes()
event.register("numba:compile", notes)  # type: ignore[no-untyped-call]
