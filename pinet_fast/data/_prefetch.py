"""Gather kernels that ask for memory lines ahead of their use.

A batch touches random places of a large file: first a line of the span table, then the lines of
the values. The loops below ask for the lines of later users while they copy the present one, so
that about a dozen misses overlap. Where Numba cannot build the instruction, the plain loops of
``_njit`` serve: half the speed, the same arrays.
"""

# mypy: disallow-untyped-decorators=false

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import NumbaError, TypingError
from numba.extending import intrinsic

from pinet_fast.data import _njit

if TYPE_CHECKING:
    from collections.abc import Callable

Array = npt.NDArray[Any]

# A miss takes about as long as planning 40 users, or copying 10. Farther ahead than that costs
# nothing up to about the double; nearer, the loops wait.
SPAN_AHEAD = 64  # users between asking for a span and reading it
VALUE_AHEAD = 16  # users between asking for values and copying them
CHUNK = 8  # integers copied at once
_LINE = 64  # bytes
_ALWAYS = 2  # lines of a window that are asked for without looking whether it has them

_intrinsic: Any = intrinsic  # its type hints lack the hidden first argument


@_intrinsic
def _ask(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the line of ``array[index]``; no value is read, so any index is safe."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        bytes_pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        place = builder.bitcast(builder.gep(data, [arguments[1]]), bytes_pointer)
        kind = ir.FunctionType(ir.VoidType(), [bytes_pointer, number, number, number])
        declare: Any = cgutils.get_or_insert_function
        function = declare(builder.module, kind, "llvm.prefetch.p0")
        # A read, to be kept in all caches, of data.
        builder.call(function, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), code


@njit(nogil=True, cache=True)
def _plan(
    spans: Array,
    users: Array,
    crop: int,
    window: int,
    shift: int,
    key: np.uint64,
    starts: Array,
    ends: Array,
    positions: Array,
    offsets: Array,
    ids: Array,
) -> None:
    last = users.shape[0] - 1
    offsets[0] = 0
    for b in range(users.shape[0]):
        _ask(spans, 2 * users[min(b + SPAN_AHEAD, last)])
        _njit.plan_user(
            spans, users[b], crop, window, shift, key, b, starts, ends, positions, offsets, ids
        )


@_intrinsic
def _move(typing: Any, source: Any, i: Any, target: Any, j: Any) -> Any:
    """Copy ``CHUNK`` integers from ``source[i:]`` to ``target[j:]``, widened; no bounds check."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers, vectors = [], []
        for place in (0, 2):
            kind = signature.args[place]
            data = context.make_array(kind)(context, builder, arguments[place]).data
            vector = ir.VectorType(context.get_data_type(kind.dtype), CHUNK)
            pointer = builder.gep(data, [arguments[place + 1]])
            pointers.append(builder.bitcast(pointer, vector.as_pointer()))
            vectors.append(vector)
        loaded = builder.load(pointers[0], align=signature.args[0].dtype.bitwidth // 8)
        if vectors[0] != vectors[1]:
            loaded = builder.sext(loaded, vectors[1])
        builder.store(loaded, pointers[1], align=signature.args[2].dtype.bitwidth // 8)
        return context.get_dummy_value()

    if source.dtype.bitwidth > target.dtype.bitwidth:
        raise TypingError("the target must not be narrower than the source")
    return types.void(source, types.intp, target, types.intp), code


@njit(nogil=True, cache=True)
def _ask_window(items: Array, starts: Array, ends: Array, b: int) -> None:
    # A second request for a line is cheaper than a branch that cannot be foreseen. Few windows have
    # more lines, but the hardware needs several misses before it follows a run by itself.
    place, last = starts[np.uint64(b)], ends[np.uint64(b)] - 1
    step = _LINE // items.itemsize
    for line in range(_ALWAYS):
        _ask(items, min(place + line * step, last))
    place += _ALWAYS * step
    while place < last:  # not range(), which divides
        _ask(items, place)
        place += step
    _ask(items, last)


@njit(nogil=True, cache=True)
def _gather(items: Array, starts: Array, ends: Array, offsets: Array, out: Array) -> None:
    num = starts.shape[0]
    for b in range(min(VALUE_AHEAD, num)):
        _ask_window(items, starts, ends, b)
    for b in range(num):
        if b + VALUE_AHEAD < num:
            _ask_window(items, starts, ends, b + VALUE_AHEAD)
        u = np.uint64(b)  # Numba makes a negative one count from the end, at a cost in every round
        i, j, end = starts[u], offsets[u], ends[u]
        # A chunk may reach past the window: the next user overwrites what it wrote there.
        stop = min(end, items.shape[0] - CHUNK + 1, i + out.shape[0] - j - CHUNK + 1)
        while i < stop:
            _move(items, i, out, j)
            i += CHUNK
            j += CHUNK
        while i < end:
            out[np.uint64(j)] = items[np.uint64(i)]
            i += 1
            j += 1


@njit(nogil=True, cache=True)
def _gather_next(
    items: Array, starts: Array, ends: Array, offsets: Array, values: Array, targets: Array
) -> None:
    num = starts.shape[0]
    for b in range(min(VALUE_AHEAD, num)):
        _ask_window(items, starts, ends, b)
    for b in range(num):
        if b + VALUE_AHEAD < num:
            _ask_window(items, starts, ends, b + VALUE_AHEAD)
        u = np.uint64(b)
        i, j, end = starts[u], offsets[u], ends[u] - 1
        stop = min(end, items.shape[0] - CHUNK, i + values.shape[0] - j - CHUNK + 1)
        while i < stop:
            _move(items, i, values, j)
            _move(items, i + 1, targets, j)
            i += CHUNK
            j += CHUNK
        while i < end:
            values[np.uint64(j)] = items[np.uint64(i)]
            targets[np.uint64(j)] = items[np.uint64(i + 1)]
            i += 1
            j += 1


def with_fallback(fast: Callable[..., None], plain: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls ``fast``, or ``plain`` once ``fast`` cannot be compiled."""
    chosen: list[Callable[..., None]] = []

    @functools.wraps(plain)
    def call(*arrays: Any) -> None:
        if chosen:
            chosen[0](*arrays)
            return
        try:
            fast(*arrays)
        except (NumbaError, RuntimeError, NotImplementedError):
            chosen.append(plain)
            plain(*arrays)
        else:
            chosen.append(fast)

    return call


plan = with_fallback(_plan, _njit.plan)
gather = with_fallback(_gather, _njit.gather)
gather_next = with_fallback(_gather_next, _njit.gather_next)
