"""Builds numbered results ahead, in threads or not, and hands them out in order."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Pipeline(Generic[T]):
    """Calls ``build(number)`` for ``first <= number < last`` in threads; ``get`` returns in order.

    At most ``ahead`` results are built or under way and not yet handed out. An error of ``build``
    is raised by the ``get`` of its number, with the traceback of the thread. The threads never
    refer to this object, so that dropping it, or the end of the process, stops them.

    Args:
        build: Makes one result; it is called from several threads at once.
        first: Number of the first result.
        last: Number after the last one.
        threads: Threads, at least 1.
        ahead: Results ahead, at least 1.
        discard: Called with every result that was built and is not handed out.
    """

    def __init__(
        self,
        build: Callable[[int], T],
        *,
        first: int,
        last: int,
        threads: int,
        ahead: int,
        discard: Callable[[T], None],
    ) -> None:
        self._shared = _Shared(first, last, ahead, discard)
        self._owner = os.getpid()
        self._threads = [
            threading.Thread(
                target=_work, args=(self._shared, build), name=f"pinet-data-{i}", daemon=True
            )
            for i in range(min(threads, ahead))
        ]
        self._stop = weakref.finalize(self, _stop, self._shared, self._threads, self._owner)
        for thread in self._threads:
            thread.start()

    @property
    def position(self) -> int:
        """Return the number that ``get`` returns next."""
        return self._shared.delivered

    @property
    def num_ready(self) -> int:
        """Return how many results wait to be handed out."""
        return len(self._shared.ready)

    @property
    def is_open(self) -> bool:
        """Return whether the threads serve: not closed, and not a copy in a forked process."""
        return self._stop.alive and self._owner == os.getpid()

    def get(self) -> T:
        """Return the next result, waiting for it.

        Raises:
            BaseException: Whatever ``build`` raised for it.
        """
        shared = self._shared
        with shared.changed:
            while shared.delivered not in shared.ready:
                shared.changed.wait()
            result: T
            result, error = shared.ready.pop(shared.delivered)
            shared.delivered += 1
            shared.changed.notify_all()
        if error is not None:
            try:
                raise error
            finally:
                del error  # it holds this frame
        return result

    def close(self) -> None:
        """Stop and join the threads; results not handed out are dropped."""
        self._stop()


class Inline(Generic[T]):
    """A pipeline without threads: ``get`` builds what it returns.

    Small results are built several at a time: after a step of training, neither the code nor the
    data of the next one are in the caches, and it takes twice as long as one right after another.

    Args:
        build: Makes one result.
        first: Number of the first result.
        last: Number after the last one.
        at_a_time: How many are built at a time, by the first of them.
        discard: Called with every result that was built and is not handed out.
    """

    def __init__(
        self,
        build: Callable[[int], T],
        *,
        first: int,
        last: int,
        at_a_time: Callable[[T], int],
        discard: Callable[[T], None],
    ) -> None:
        self.position = first
        self.is_open = True
        self._build, self._last = build, last
        self._at_a_time, self._discard = at_a_time, discard
        self._ready: deque[T] = deque()

    @property
    def num_ready(self) -> int:
        """Return how many results wait to be handed out."""
        return len(self._ready)

    def get(self) -> T:
        """Return the next result.

        Raises:
            BaseException: Whatever ``build`` raised for it.
        """
        if not self._ready:
            self._ready.append(self._build(self.position))
            self._build_on(self.position + self._at_a_time(self._ready[0]))
        self.position += 1
        return self._ready.popleft()

    def _build_on(self, end: int) -> None:
        for number in range(self.position + 1, min(end, self._last)):
            try:
                self._ready.append(self._build(number))
            except Exception:
                return  # it is raised again when this result is asked for

    def close(self) -> None:
        """Drop what is not handed out."""
        self.is_open = False
        while self._ready:
            self._discard(self._ready.popleft())


class _Shared:
    def __init__(self, first: int, last: int, ahead: int, discard: Callable[[Any], None]) -> None:
        self.changed = threading.Condition()
        self.begun = first
        self.delivered = first
        self.last = last
        self.ahead = ahead
        self.discard = discard
        self.is_stopped = False
        self.ready: dict[int, tuple[Any, BaseException | None]] = {}

    def next_number(self) -> int | None:
        """Wait until a result may be begun, and return its number; None where there is no more."""
        with self.changed:
            while not self.is_stopped and self.begun < self.last:
                if self.begun < self.delivered + self.ahead:
                    self.begun += 1
                    return self.begun - 1
                self.changed.wait()
            return None

    def put(self, number: int, result: Any, error: BaseException | None) -> None:
        with self.changed:
            if not self.is_stopped:
                self.ready[number] = (result, error)
                self.changed.notify_all()
            elif error is None:
                self.discard(result)


def _work(shared: _Shared, build: Callable[[int], Any]) -> None:
    while (number := shared.next_number()) is not None:
        result = None
        try:
            result = build(number)
        except BaseException as error:
            shared.put(number, None, error)
        else:
            shared.put(number, result, None)
        del result


def _stop(shared: _Shared, threads: list[threading.Thread], owner: int) -> None:
    if owner != os.getpid():  # a forked process has a copy of the lock, but not the threads
        return
    with shared.changed:
        shared.is_stopped = True
        for result, error in shared.ready.values():
            if error is None:
                shared.discard(result)
        shared.ready.clear()
        shared.changed.notify_all()
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join()
