"""Makes one batch after the other, on the host or on its way to a device."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pinet_fast import profiling
from pinet_fast.data._blocks import Ring, Slot
from pinet_fast.data._windows import fresh_slot

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from pinet_fast.data._assemble import Assembly
    from pinet_fast.data._windows import BatchBuilder
    from pinet_fast.data.batch import RaggedBatch
    from pinet_fast.data.strata import Strata


@dataclass(eq=False)
class Made:
    """A batch that is built but not handed out.

    Attributes:
        assembly: What turns the block into a batch.
        block: The block, on the device of the batch.
        slot: The host memory, where it is lent by the ring.
        is_leased: Whether the batch lies in the slot.
        copied: What says that the copy to the device has ended, or None where there was none.
    """

    assembly: Assembly
    block: Tensor
    slot: Slot | None = None
    is_leased: bool = False
    copied: torch.cuda.Event | None = None

    def hand_out(self, strata: Strata) -> RaggedBatch:
        """Return the batch; the present stream will wait for the copy, the host does not."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.block.device)
            stream.wait_event(self.copied)
            self.block.record_stream(stream)
        return self.assembly.batch(strata, self.block)


class Maker:
    """Builds batches and, with a CUDA device, begins their copy; threads share it."""

    def __init__(
        self, builder: BatchBuilder, device: torch.device | None, *, is_leased: bool
    ) -> None:
        self._builder = builder
        self._device = None if device is None or device.type == "cpu" else device
        self._is_cuda = self._device is not None and self._device.type == "cuda"
        self._is_leased = is_leased and self._device is None
        self._stream: torch.cuda.Stream | None = None  # made at the first copy
        self._lock = threading.Lock()
        self.ring = Ring(pinned=self._is_cuda)

    def make(self, epoch: int, step: int, users: npt.NDArray[np.int64]) -> Made:
        """Build one batch."""
        take = self.ring.take if self._is_leased or self._is_cuda else fresh_slot
        slot, assembly = self._builder.build(epoch, step, users, take)
        block = slot.memory[: assembly.layout.num_words]
        if self._is_cuda:
            return self._copied(slot, block, assembly)
        if self._device is not None:
            with profiling.TO_DEVICE:
                return Made(assembly, block.to(self._device))
        return Made(assembly, block, slot if self._is_leased else None, self._is_leased)

    def discard(self, made: Made) -> None:
        """Take back what a batch that nobody gets was lent."""
        if made.is_leased and made.slot is not None:
            self.ring.put(made.slot)

    def _copied(self, slot: Slot, block: Tensor, assembly: Assembly) -> Made:
        with self._lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with profiling.TO_DEVICE, torch.cuda.stream(self._stream):
            moved = block.to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        # Lent again at once: whoever takes it waits for the event first.
        slot.copied = event
        self.ring.put(slot)
        return Made(assembly, moved, copied=event)
