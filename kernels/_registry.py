"""Which backend serves an op: explicit argument, then environment, then priority."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pinet_fast import _env
from pinet_fast.errors import BackendUnavailableError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger("pinet_fast.kernels")


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Args:
        name: ``reference``, ``cpp`` or ``triton``; the same names for every op.
        priority: Higher is tried first.
        probe: Returns None if this machine has what the backend needs, else the reason why not.
            Called at the first use of the op, never at import.
        is_supported: Called with the op's inputs; returns None if it can serve them, else why not.
        impl: The kernel; its arguments are the op's affair.
    """

    name: str
    priority: int
    probe: Callable[[], str | None]
    is_supported: Callable[..., str | None]
    impl: Callable[..., Any]

    def refusal(self, inputs: Sequence[Any]) -> str | None:
        """Return why this backend cannot serve these inputs on this machine, or None."""
        return self.probe() or self.is_supported(*inputs)


_ops: dict[str, tuple[Backend, ...]] = {}
_arguments: dict[str, Callable[..., tuple[Any, ...]]] = {}
_calls: Counter[tuple[str, str]] = Counter()
_logged: set[tuple[str, str]] = set()


def register(
    op: str,
    backends: Sequence[Backend],
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Make the backends of an op known; called once per op, when its module is imported.

    Args:
        op: Name of the op.
        backends: Its implementations.
        arguments: Takes what the op's public function does, by position, and returns what
            ``is_supported`` takes; None where the op has no public function.
    """
    _ops[op] = tuple(sorted(backends, key=lambda backend: -backend.priority))
    if arguments is not None:
        _arguments[op] = arguments


def backends(op: str) -> tuple[Backend, ...]:
    """Return the backends of an op, highest priority first."""
    return _ops[op]


def is_first(name: str, ops: Sequence[str]) -> bool:
    """Return whether a backend serves these ops wherever it supports the inputs."""
    forced = _env.forced_backend()
    if forced is not None and forced != name:
        return False
    for op in ops:
        first = _ops[op][0]
        if first.name != name or first.probe() is not None:
            return False
    return True


def ops() -> tuple[str, ...]:
    """Return the names of all registered ops."""
    return tuple(_ops)


def select(op: str, inputs: Sequence[Any], explicit: str | None = None) -> Backend:
    """Return the backend that serves these inputs.

    Args:
        op: Name of a registered op.
        inputs: What the backends' ``is_supported`` takes.
        explicit: Name of the only backend that may serve; None leaves it to
            ``PINET_FAST_BACKEND``, and without that to priority.

    Raises:
        BackendUnavailableError: The backend asked for, or every backend, cannot serve.
    """
    forced = explicit or _env.forced_backend()
    passed_over: list[str] = []
    for backend in _ops[op]:
        if forced is not None and backend.name != forced:
            continue
        reason = backend.probe() or backend.is_supported(*inputs)  # written out: every op pays
        if reason is None:
            if passed_over:
                _log_fallback(op, backend.name, passed_over)
            return backend
        passed_over.append(f"{backend.name} ({reason})")
    asked = f"backend {forced!r} cannot serve" if forced else "no backend can serve"
    where = "the argument backend=" if explicit else f"the environment variable {_env.BACKEND}"
    fix = f"drop {where} to let the library choose" if forced else "see the reasons below"
    lines = _lines(op, inputs)
    raise BackendUnavailableError(f"{op}: {asked} these inputs; {fix}.\n  " + "\n  ".join(lines))


def explain(op: str, inputs: Sequence[Any]) -> str:
    """Say which backends of an op can serve some inputs, and why the others cannot.

    Args:
        op: Name of the op, such as ``"stratum_gram"``.
        inputs: The arguments of the function of that name, by position and without ``backend``;
            nothing is computed.

    Returns:
        One line per backend, in the order in which they are tried: its name, and ``can serve`` or
        the reason why not.

    Raises:
        InputError: There is no such op, or it takes other arguments.
    """
    if op not in _arguments:
        near = difflib.get_close_matches(op, _arguments, n=1)
        raise InputError(
            f"explain: op: expected one of {', '.join(sorted(_arguments))}; got {op!r}"
            + (f"; did you mean {near[0]!r}?" if near else "; choose one of them")
        )
    arguments = _arguments[op]
    try:
        bound = inspect.signature(arguments).bind(*inputs)
    except TypeError as error:
        expected = ", ".join(inspect.signature(arguments).parameters)
        raise InputError(
            f"explain: inputs: expected the arguments of {op} ({expected}), got {len(inputs)} of "
            "them; pass a list, as the op takes them"
        ) from error
    return "\n".join(_lines(op, arguments(*bound.args)))


def _lines(op: str, inputs: Sequence[Any]) -> list[str]:
    found = [(backend.name, backend.refusal(inputs)) for backend in _ops[op]]
    return [f"{name}: {'can serve' if reason is None else reason}" for name, reason in found]


def record_call(op: str, backend: str, count: int = 1) -> None:
    """Count calls; the op's kernel does this after it ran."""
    _calls[op, backend] += count


def num_calls(op: str, backend: str) -> int:
    """Return how often a backend has run an op in this process."""
    return _calls[op, backend]


def backend_status() -> dict[str, str | None]:
    """Return every backend, best first, with None if it works here, else the reason why not."""
    status: dict[str, str | None] = {}
    for op in sorted(_ops):
        for backend in _ops[op]:
            status[backend.name] = status.get(backend.name) or backend.probe()
    return status


def describe_status() -> str:
    """Return one line for people: which backends serve on this machine, and why others do not."""
    status = backend_status()
    serving = [name for name, reason in status.items() if reason is None]
    off = "; ".join(f"{name}: {reason}" for name, reason in status.items() if reason is not None)
    head = ", ".join(serving) if len(serving) > 1 else f"{', '.join(serving)} serves"
    return f"kernels: {head} ({off})" if off else f"kernels: {head}"


def _log_fallback(op: str, chosen: str, passed_over: list[str]) -> None:
    if (op, chosen) not in _logged:
        _logged.add((op, chosen))
        logger.info("%s: %s serves; passed over: %s", op, chosen, ", ".join(passed_over))
