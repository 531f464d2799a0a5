"""Batches that predict the held-out event of every user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pinet_fast.data import _prefetch
from pinet_fast.data._assemble import check_max_len, check_strata, offsets_of, ragged_batch
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pinet_fast.data.batch import RaggedBatch
    from pinet_fast.data.negatives import FrozenNegatives
    from pinet_fast.data.splits import Part, Split
    from pinet_fast.data.store import SequenceStore
    from pinet_fast.data.strata import Strata

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EvaluationBatch:
    """B users with one held-out event each, grouped by ascending stratum.

    Attributes:
        batch: The last ``max_len`` events before the target; its targets and negatives are None.
        targets: The held-out items, int64 [B].
        history: Items of all events before the target, ascending and each once, for masking,
            int64 [H]; read from the store's sorted histories. It may hold the target itself, where
            a user comes back to an item: do not mask that one.
        history_offsets: int64 [B + 1].
        users: Row numbers of the store, int64 [B].
        strata_ids: Strata of the users by their training events, int64 [B].
        negatives: Fixed negatives of every target, int64 [B, n], or None.
    """

    batch: RaggedBatch
    targets: Tensor
    history: Tensor
    history_offsets: Tensor
    users: Tensor
    strata_ids: Tensor
    negatives: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EvaluationBatch:
        """Return the batch on a device; tensors that are there already are shared."""
        return EvaluationBatch(
            self.batch.to(device, non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.history.to(device, non_blocking=non_blocking),
            self.history_offsets.to(device, non_blocking=non_blocking),
            self.users.to(device, non_blocking=non_blocking),
            self.strata_ids.to(device, non_blocking=non_blocking),
            None
            if self.negatives is None
            else self.negatives.to(device, non_blocking=non_blocking),
        )


def evaluation_batches(
    store: SequenceStore,
    *,
    split: Split,
    strata: Strata,
    part: Part = "test",
    max_len: int,
    batch_size: int,
    negatives: FrozenNegatives | None = None,
) -> Iterator[EvaluationBatch]:
    """Yield every user that has a held-out event once, in blocks of the order of the store.

    Args:
        store: The sequences.
        split: Which events are held out.
        strata: Strata of the users.
        part: ``"valid"`` or ``"test"``; the test history includes the validation event.
        max_len: Events of a sequence at most; the latest are kept.
        batch_size: Users of a batch; the last batch holds the rest.
        negatives: Negatives for a sampled evaluation, from ``Negatives.frozen`` of the same store
            and part; None for evaluation on the full catalogue.

    Returns:
        An iterator over the batches; inside one, users are stably grouped by stratum.

    Raises:
        ConfigError: An option out of its range.
        StrataError: Strata of another store.
        StoreError: The file of the store was written to.
    """
    check_max_len(max_len)
    check_strata(store, strata)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
    if negatives is not None and (
        negatives.store.fingerprint != store.fingerprint or negatives.part != part
    ):
        raise ConfigError(
            f"negatives: frozen for part {negatives.part!r} of {negatives.store.source}, not "
            f"{part!r} of {store.source}; freeze them for this store and part"
        )
    store.check_unchanged()
    users, positions = split.holdout(store, part)
    return _blocks(store, strata, users, positions, max_len, batch_size, negatives)


def _blocks(
    store: SequenceStore,
    strata: Strata,
    users: IntArray,
    positions: IntArray,
    max_len: int,
    batch_size: int,
    negatives: FrozenNegatives | None,
) -> Iterator[EvaluationBatch]:
    for first in range(0, len(users), batch_size):
        store.check_unchanged()
        block = users[first : first + batch_size]
        grouped = np.argsort(strata.ids[block], kind="stable")
        block, ends = block[grouped], positions[first : first + batch_size][grouped]
        starts = store.offsets[block]
        history, history_offsets = store.histories.before(block, ends - starts)
        values, offsets = _gathered(store, np.maximum(starts, ends - max_len), ends)
        batch = ragged_batch(strata, block, values, offsets)
        yield EvaluationBatch(
            batch=batch,
            targets=torch.from_numpy(store.items[ends].astype(np.int64)),
            history=torch.from_numpy(history.astype(np.int64)),
            history_offsets=torch.from_numpy(history_offsets),
            users=batch.users,
            strata_ids=batch.strata.ids,
            negatives=None if negatives is None else torch.from_numpy(negatives.draw(block, ends)),
        )


def _gathered(store: SequenceStore, starts: IntArray, ends: IntArray) -> tuple[IntArray, IntArray]:
    offsets = offsets_of(ends - starts)
    out = np.empty(offsets[-1], np.int64)
    _prefetch.gather(store.items, starts, ends, offsets, out)
    return out, offsets
