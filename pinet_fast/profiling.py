"""Named ranges for Nsight and for torch.profiler: off by default, and then almost free.

``PINET_FAST_NVTX=1`` or ``enable()`` shows them in Nsight, in the domain ``pinet_fast``;
``enable("torch")`` in the traces of torch.profiler, as ``pinet_fast/<category>/<name>``.
Categories are ``data/plan``, ``data/gather``, ``data/negatives``, ``data/h2d``, ``model``,
``model/boundary``, ``backward``, ``aggregate`` and ``optim``.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from pinet_fast import _env
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import ClassVar, Protocol

    class _Sink(Protocol):
        def push(self, entered: Range) -> None: ...

        def pop(self) -> None: ...


Mode = Literal["nvtx", "torch", "both"]

DOMAIN = "pinet_fast"

_COLOURS = {"data": "green", "model": "blue", "backward": "purple", "aggregate": "orange",
            "optim": "red"}  # fmt: skip

# What a range does while ranges are off: methods of the empty string, which run in C, take what
# `with` gives them and return nothing true. Functions of Python cost twice as much.
_NOTHING: Callable[[], None] = cast("Any", "".lower)
_NOTHING_AT_EXIT: Callable[..., None] = cast("Any", "".format)


class Range:
    """A reusable named range; entering it does nothing while ranges are off.

    Threads may share it; one thread enters and leaves ranges in the order of a stack.

    Args:
        name: What is shown.
        category: What kind of work it is, ``a/b`` for a part b of a.
    """

    __slots__ = ("attributes", "category", "name")

    __enter__: ClassVar[Callable[..., None]] = staticmethod(_NOTHING)
    __exit__: ClassVar[Callable[..., None]] = staticmethod(_NOTHING_AT_EXIT)

    def __init__(self, name: str, category: str) -> None:
        self.name = name
        self.category = category
        self.attributes: Any = None  # NVTX's, made when it is first shown


def _enter(entered: Range) -> None:
    for sink in _sinks:
        sink.push(entered)


def _exit(
    entered: Range,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    for sink in reversed(_sinks):
        sink.pop()


class _Nvtx:
    """Shows ranges in Nsight."""

    def __init__(self) -> None:
        import nvtx

        self._domain = nvtx.get_domain(DOMAIN)

    def push(self, entered: Range) -> None:
        if entered.attributes is None:
            colour = _COLOURS[entered.category.split("/")[0]]
            entered.attributes = self._domain.get_event_attributes(
                message=entered.name, color=colour, category=entered.category
            )
        self._domain.push_range(entered.attributes)

    def pop(self) -> None:
        self._domain.pop_range()


class _TorchProfiler:
    """Shows ranges in the traces of torch.profiler, and in NVTX under torch's ``emit_nvtx``."""

    def __init__(self) -> None:
        import torch

        # Private, but 20 times as fast as the public one, and it calls no op that modes would see.
        fast = getattr(torch._C._profiler, "_RecordFunctionFast", None)
        self._record: Callable[[str], Any] = fast or torch.profiler.record_function
        self._entered = threading.local()

    def push(self, entered: Range) -> None:
        record = self._record(f"{DOMAIN}/{entered.category}/{entered.name}")
        record.__enter__()
        self._entered.__dict__.setdefault("stack", []).append(record)

    def pop(self) -> None:
        self._entered.stack.pop().__exit__(None, None, None)


_sinks: tuple[_Sink, ...] = ()
_boundaries: dict[str, Range] = {}

is_on = False
"""Whether ranges are shown; hot paths ask it before they choose a range by name."""

DRAW = Range("draw", "data/plan")
PLAN = Range("plan", "data/plan")
GATHER = Range("gather", "data/gather")
NEGATIVES = Range("negatives", "data/negatives")
TO_DEVICE = Range("to device", "data/h2d")
FORWARD = Range("forward", "model")
BACKWARD = Range("backward", "backward")
LEAK_CHECK = Range("leak check", "backward")
GRAM = Range("gram", "aggregate")
RULE = Range("rule", "aggregate")
COMBINE = Range("combine", "aggregate")
STEP = Range("step", "optim")

PHASES = (DRAW, PLAN, GATHER, NEGATIVES, TO_DEVICE, FORWARD, BACKWARD, LEAK_CHECK, GRAM, RULE,
          COMBINE, STEP)  # fmt: skip
"""All ranges but those of boundaries, in the order of a step."""


def boundary(func: Callable[..., Any]) -> Range:
    """Return the range of a call in which a parameter meets rows, by the name of its function."""
    name = str(getattr(func, "__name__", func))
    found = _boundaries.get(name)
    if found is None:
        found = _boundaries[name] = Range(name, "model/boundary")
    return found


def enable(mode: Mode = "nvtx") -> None:
    """Turn ranges on; call it outside of any range, while no other thread is inside one.

    Args:
        mode: ``"nvtx"`` for Nsight, ``"torch"`` for torch.profiler, or ``"both"``.

    Raises:
        ConfigError: Another mode.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"profiling.enable: expected 'nvtx', 'torch' or 'both', got {mode!r}")
    sinks: list[_Sink] = []
    if mode != "torch":
        sinks.append(_Nvtx())
    if mode != "nvtx":
        sinks.append(_TorchProfiler())
    _show_in(*sinks)


def disable() -> None:
    """Turn ranges off; call it outside of any range, while no other thread is inside one."""
    _show_in()


def is_enabled() -> bool:
    """Return whether ranges are on."""
    return is_on


def _show_in(*sinks: _Sink) -> None:
    global _sinks, is_on
    _sinks, is_on = sinks, bool(sinks)
    Range.__enter__ = _enter if sinks else staticmethod(_NOTHING)
    Range.__exit__ = _exit if sinks else staticmethod(_NOTHING_AT_EXIT)


if _env.nvtx_enabled():
    enable()
