"""One block of memory a batch: how its arrays lie in it, and the ring that lends blocks again."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]

_FLOAT32, _INT64 = np.dtype(np.float32), np.dtype(np.int64)
_TORCH = {_FLOAT32: torch.float32, _INT64: torch.int64}


class Layout:
    """Places of named int64 and float32 arrays in a block of int64 words."""

    def __init__(self) -> None:
        self.num_words = 0
        self._places: dict[str, tuple[int, int, tuple[int, ...], np.dtype[Any]]] = {}

    def add(self, name: str, *shape: int, dtype: npt.DTypeLike = np.int64) -> None:
        """Append an array; float32 arrays begin at a whole word, as all do."""
        kind = np.dtype(dtype)
        end = self.num_words + -(-math.prod(shape) * kind.itemsize // _INT64.itemsize)
        self._places[name] = (self.num_words, end, shape, kind)
        self.num_words = end

    def arrays(self, block: Array) -> dict[str, Array]:
        """Return the arrays as views of a block."""
        found = {}
        for name, (start, end, shape, kind) in self._places.items():
            part = block[start:end]
            if kind != _INT64:  # a narrower one may not fill its last word
                part = part.view(kind)[: math.prod(shape)]
            found[name] = part if len(shape) == 1 else part.reshape(shape)
        return found

    def tensors(self, block: Tensor) -> dict[str, Tensor]:
        """Return the arrays as tensors that are views of a block, on its device."""
        found = {}
        for name, (start, end, shape, kind) in self._places.items():
            part = block[start:end]
            if kind != _INT64:
                part = part.view(_TORCH[kind])[: math.prod(shape)]
            found[name] = part if len(shape) == 1 else part.view(shape)
        return found


@dataclass(eq=False)
class Slot:
    """Memory that holds one batch after the other.

    Attributes:
        memory: int64 words, page-locked where batches are copied to a device.
        copied: What says that the last copy out of it has ended, or None.
    """

    memory: Tensor
    copied: torch.cuda.Event | None = field(default=None)


class Ring:
    """Lends slots; a slot grows with the largest batch it held, and is made once a loader.

    Args:
        pinned: Whether the memory is page-locked.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._free: list[Slot] = []
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Return how many slots are not lent."""
        return len(self._free)

    def take(self, num_words: int) -> Slot:
        """Return a slot of at least that size that no copy reads any more."""
        with self._lock:
            slot = self._free.pop() if self._free else None
        if slot is not None and slot.copied is not None:
            slot.copied.synchronize()
            slot.copied = None
        if slot is None or slot.memory.numel() < num_words:
            # A quarter more, so that slots stop growing after the first batches.
            size = num_words + num_words // 4
            slot = Slot(torch.empty(size, dtype=torch.int64, pin_memory=self.pinned))
        return slot

    def put(self, slot: Slot) -> None:
        """Take a slot back."""
        with self._lock:
            self._free.append(slot)

    def clear(self) -> None:
        """Release the memory of the slots that are not lent."""
        with self._lock:
            self._free.clear()
