"""NVTX ranges for Nsight: off by default, and then almost free.

Ranges carry the domain ``pinet_fast``. Turn them on by ``PINET_FAST_NVTX=1`` or ``enable()``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pinet_fast import _env

if TYPE_CHECKING:
    from types import TracebackType


class Range:
    """A reusable named range; entering it does nothing while profiling is off.

    Args:
        name: What Nsight shows.
        category: ``data``, ``model``, ``backward``, ``aggregate`` or ``optim``.
    """

    __slots__ = ("_attributes", "category", "name")

    def __init__(self, name: str, category: str) -> None:
        self.name = name
        self.category = category
        self._attributes: Any = None

    def __enter__(self) -> None:
        if _domain is not None:
            if self._attributes is None:
                self._attributes = _domain.get_event_attributes(
                    message=self.name, category=self.category
                )
            _domain.push_range(self._attributes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _domain is not None:
            _domain.pop_range()


_domain: Any = None

GATHER = Range("gather", "data")
FORWARD = Range("forward", "model")
BACKWARD = Range("backward", "backward")
GRAM = Range("gram", "aggregate")
RULE = Range("rule", "aggregate")
COMBINE = Range("combine", "aggregate")
STEP = Range("step", "optim")


def enable() -> None:
    """Turn ranges on; call it outside of any range."""
    import nvtx

    global _domain
    _domain = nvtx.get_domain("pinet_fast")


def disable() -> None:
    """Turn ranges off; call it outside of any range."""
    global _domain
    _domain = None


def is_enabled() -> bool:
    """Return whether ranges are on."""
    return _domain is not None


if _env.nvtx_enabled():
    enable()
