"""Turns drawn users into ragged training batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from pinet_fast import profiling
from pinet_fast.data import _njit
from pinet_fast.data._assemble import check_max_len, check_strata, offsets_of, ragged_batch
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from pinet_fast.data.batch import RaggedBatch
    from pinet_fast.data.negatives import Negatives
    from pinet_fast.data.sampler import StratifiedBatchSampler
    from pinet_fast.data.splits import Split
    from pinet_fast.data.store import SequenceStore
    from pinet_fast.data.strata import Strata

IntArray = npt.NDArray[np.int64]

_MIN_TRAINABLE = 2


class RaggedLoader:
    """Yields the batches of an epoch; iterate again for the next one.

    Of every drawn user it takes the last ``max_len + 1`` training events: all but the last are the
    values, all but the first the targets. Held-out events are never read. There are no threads yet:
    a batch is built in the calling thread when it is asked for, and ``close`` has nothing to stop.

    Args:
        store: The sequences.
        sampler: Draws the users; it holds the position.
        split: Which events are training events.
        strata: The strata that the sampler draws from.
        max_len: Events of a sequence at most; the latest are kept.
        targets: Only ``"next"``, the event that follows, exists so far.
        negatives: Negatives of every target, or None for none.
        seed: Decides the negatives, together with the epoch; the order is up to the sampler's.

    Raises:
        ConfigError: An option out of its range, or a sampler of other strata.
        StrataError: Strata of another store.
        DataError: A user whose history leaves no negative.
    """

    def __init__(
        self,
        store: SequenceStore,
        sampler: StratifiedBatchSampler,
        *,
        split: Split,
        strata: Strata,
        max_len: int,
        targets: str = "next",
        negatives: Negatives | None = None,
        seed: int = 0,
    ) -> None:
        check_max_len(max_len)
        check_strata(store, strata)
        if targets != "next":
            raise ConfigError(f"targets: only 'next' exists so far, got {targets!r}")
        if sampler.strata.fingerprint != strata.fingerprint:
            raise ConfigError("loader: the sampler draws from other strata; give both the same")
        if sampler.min_activeness < _MIN_TRAINABLE:
            raise ConfigError(
                "loader: a next-event target needs two training events; "
                f"give the sampler min_activeness >= 2, not {sampler.min_activeness}"
            )
        self.store = store
        self.sampler = sampler
        self.split = split
        self.strata = strata
        self.max_len = max_len
        self._train_ends = split.train_ends(store)
        self._negatives = None if negatives is None else negatives.bind(store, split, seed=seed)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[RaggedBatch]:
        """Yield the batches from the current position to the end of the epoch."""
        for users in self.sampler:
            # Until the next batch is asked for, the sampler is still in the epoch of this one.
            with profiling.GATHER:
                batch = self._batch(users, self.sampler.epoch)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; the current epoch keeps its position."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batches delivered so far."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that ``state_dict`` returned.

        Args:
            state: The position.

        Raises:
            CheckpointError: It is incomplete, or belongs to other data or options.
        """
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """Release what the loader holds besides memory: nothing yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _batch(self, users: IntArray, epoch: int) -> RaggedBatch:
        ends = self._train_ends[users]
        firsts = self.store.offsets[users]
        starts = np.maximum(firsts, ends - (self.max_len + 1))
        offsets = offsets_of(ends - starts - 1)
        values = np.empty(offsets[-1], np.int64)
        targets = np.empty(offsets[-1], np.int64)
        _njit.gather_next(self.store.items, starts, ends, offsets, values, targets)
        negatives = None
        if self._negatives is not None:
            negatives = self._negatives.draw(epoch, users, starts - firsts + 1, offsets)
        return ragged_batch(self.strata, users, values, offsets, targets, negatives)
