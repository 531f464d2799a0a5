"""What a loader yields: ragged sequences, their strata, targets and negatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from pinet_fast.aggregation.strata_index import StrataIndex


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """B sequences of T events in all, laid out one after the other without padding.

    Users of a stratum are contiguous, and strata ascend.

    Attributes:
        values: Item codes 1..V, int64 [T].
        offsets: int64 [B + 1]; user ``b`` owns events ``offsets[b]`` to ``offsets[b + 1]``.
        strata: Strata of the users and, through the lengths, of the events.
        users: Row numbers of the store, int64 [B].
        targets: Item to be predicted at every event, int64 [T], or None.
        negatives: Items that are no target, int64 [T, n], or None.
        max_len: Events of the longest sequence of this batch; on the host, so that a model need
            not wait for the device to learn it.
    """

    values: Tensor
    offsets: Tensor
    strata: StrataIndex
    users: Tensor
    targets: Tensor | None
    negatives: Tensor | None
    max_len: int

    @property
    def lengths(self) -> Tensor:
        """Return the events of every user, int64 [B]."""
        return self.offsets.diff()

    @property
    def num_users(self) -> int:
        """Return B."""
        return self.users.numel()

    @property
    def num_events(self) -> int:
        """Return T."""
        return self.values.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RaggedBatch:
        """Return the batch on a device; tensors that are there already are shared."""
        moved = self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, strata=self.strata.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RaggedBatch:
        """Return the batch in page-locked memory, for ``to(device, non_blocking=True)``."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> RaggedBatch:
        return replace(
            self,
            values=function(self.values),
            offsets=function(self.offsets),
            users=function(self.users),
            targets=None if self.targets is None else function(self.targets),
            negatives=None if self.negatives is None else function(self.negatives),
        )

    def __repr__(self) -> str:
        parts = [f"users=[{self.num_users}]", f"values=[{self.num_events}]"]
        if self.targets is not None:
            parts.append(f"targets={list(self.targets.shape)}")
        if self.negatives is not None:
            parts.append(f"negatives={list(self.negatives.shape)}")
        return (
            f"RaggedBatch({', '.join(parts)}, strata={self.strata.num_strata}, "
            f"max_len={self.max_len}, device={self.values.device})"
        )
