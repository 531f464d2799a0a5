"""Turns drawn users into ragged training batches, in the calling thread or ahead in others."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch

from pinet_fast.data._assemble import check_max_len, check_strata
from pinet_fast.data._making import Made, Maker
from pinet_fast.data._pipeline import Inline, Pipeline
from pinet_fast.data._windows import BatchBuilder
from pinet_fast.data.augment import Augmentation
from pinet_fast.data.loader_stats import Counts, LoaderStats
from pinet_fast.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from types import TracebackType

    from pinet_fast.data._blocks import Slot
    from pinet_fast.data._windows import CropName, Targets
    from pinet_fast.data.batch import RaggedBatch
    from pinet_fast.data.negatives import Negatives
    from pinet_fast.data.sampler import StratifiedBatchSampler
    from pinet_fast.data.splits import Split
    from pinet_fast.data.store import SequenceStore
    from pinet_fast.data.strata import Strata

Lifetime = Literal["copy", "lease"]

_MIN_TRAINABLE = 2
_WORDS_AT_A_TIME, _BATCHES_AT_A_TIME = 1 << 15, 16
"""Without threads, batches are built until they have so many words together (0.25 MB), or are so
many."""


class RaggedLoader:
    """Yields the batches of an epoch; iterate again for the next one.

    Only training events are read. The stream is the same for any number of threads, and the state
    counts batches that were handed out, not those built ahead.

    Args:
        store: The sequences.
        sampler: Draws the users; it holds the position.
        split: Which events are training events.
        strata: The strata that the sampler draws from.
        max_len: Events of a sequence at most.
        targets: ``"next"``: the event after every event, int64 [T]; ``"last"``: the event after
            the last one, int64 [B]; None: none. Values and targets together are a window of
            ``max_len + 1`` events (``max_len`` with None).
        crop: Which window of a user's training events: ``"tail"``, the last one;
            ``"random_window"``, one that begins anywhere; ``"prefix"``, the last one of the first
            m events, m drawn from all that leave a target. Drawn by (seed, epoch, user).
        augment: ``Crop``, ``Mask``, ``Reorder``, ``Drop`` (``pinet_fast.data.augment``), or several
            of them, applied to the window in that order. The target of an event stays the event
            that came next in the log, and with ``"last"`` the target is what came after the latest
            event shown. Windows that negatives exclude are those before it.
        negatives: Negatives, or None for none.
        seed: Decides crops, augmentations and negatives, together with the epoch; the order is
            the sampler's.
        threads: Threads that build batches ahead; they start at the first batch. 0 builds them
            when they are asked for, in 0.1-0.3 ms, small ones several at a time: on a CPU that the
            model keeps busy threads gained nothing. Take 1 where a device waits
            (``stats().wait_share``).
        prefetch: Batches that are built ahead at most, with threads.
        device: Where batches go; None leaves them in main memory. With a CUDA device each is one
            page-locked block, copied on a stream of its own.
        lifetime: ``"copy"``: a batch owns its memory; ``"lease"``: the memory of a batch is used
            again once the next one is asked for. On another device a batch always owns its memory.

    Raises:
        ConfigError: An option out of its range, or a sampler of other strata.
        StrataError: Strata of another store.
        DataError: A user whose history leaves no negative.
        StoreError: While it is iterated: the file of the store was written to.
    """

    def __init__(
        self,
        store: SequenceStore,
        sampler: StratifiedBatchSampler,
        *,
        split: Split,
        strata: Strata,
        max_len: int,
        targets: Targets | None = "next",
        crop: CropName = "tail",
        augment: Augmentation | Sequence[Augmentation] = (),
        negatives: Negatives | None = None,
        seed: int = 0,
        threads: int = 0,
        prefetch: int = 3,
        device: torch.device | str | None = None,
        lifetime: Lifetime = "copy",
    ) -> None:
        check_max_len(max_len)
        check_strata(store, strata)
        for name, value, least in (("threads", threads, 0), ("prefetch", prefetch, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}: expected an integer >= {least}, got {value!r}")
        if lifetime not in get_args(Lifetime):
            raise ConfigError(f"lifetime: expected 'copy' or 'lease', got {lifetime!r}")
        if sampler.strata.fingerprint != strata.fingerprint:
            raise ConfigError("loader: the sampler draws from other strata; give both the same")
        if targets is not None and sampler.min_activeness < _MIN_TRAINABLE:
            raise ConfigError(
                "loader: a next-event target needs two training events; "
                f"give the sampler min_activeness >= 2, not {sampler.min_activeness}"
            )
        self.store = store
        self.sampler = sampler
        self.split = split
        self.strata = strata
        self.max_len = max_len
        self.threads = threads
        self.prefetch = prefetch
        self.lifetime = lifetime
        self.device = None if device is None else torch.device(device)
        builder = BatchBuilder(
            store,
            split=split,
            strata=strata,
            max_len=max_len,
            crop=crop,
            augment=augment,
            targets=targets,
            negatives=None if negatives is None else negatives.bind(store, split, seed=seed),
            stratum_weights=sampler.stratum_weights,
            seed=seed,
        )
        chain = (augment,) if isinstance(augment, Augmentation) else tuple(augment)
        self._options = {
            "seed": seed, "max_len": max_len, "targets": targets, "crop": crop,
            "augment": repr(chain), "negatives": repr(negatives),
        }  # fmt: skip
        self._maker = Maker(builder, self.device, is_leased=lifetime == "lease")
        self._pipeline: Pipeline[Made] | Inline[Made] | None = None
        self._epoch = 0  # of the pipeline
        self._counts = Counts()

    @property
    def batch_sampler(self) -> StratifiedBatchSampler:
        """Return the sampler, under the name by which frameworks look for ``set_epoch``."""
        return self.sampler

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[RaggedBatch]:
        """Yield the batches from the current position to the end of the epoch.

        One iteration at a time has the threads: another one begins by closing the first one's.
        """
        made_batches = self._made()
        leased: Slot | None = None
        try:
            began = time.perf_counter()
            for made, depth in made_batches:
                batch = made.hand_out(self.strata)
                leased = made.slot if made.is_leased else None
                self._count(made, depth, time.perf_counter() - began)
                began = time.perf_counter()
                yield batch
                del batch, made
                self._counts.seconds += time.perf_counter() - began
                began = time.perf_counter()
                if leased is not None:
                    self._maker.ring.put(leased)
                    leased = None
        finally:
            if leased is not None:
                self._maker.ring.put(leased)
            made_batches.close()

    def _made(self) -> Generator[tuple[Made, int], None, None]:
        sampler, pipeline = self.sampler, None
        try:
            while (step := sampler.step) < len(sampler):
                epoch = sampler.epoch
                if pipeline is None or not self._serves(pipeline, epoch, step):
                    pipeline = self._start(epoch, step)
                depth = pipeline.num_ready
                made = pipeline.get()
                sampler.count(epoch, step)
                yield made, depth
            for _ in sampler:  # at its end already: goes to the next epoch
                raise AssertionError("the sampler grew while it was read")
        finally:
            if pipeline is not None:
                pipeline.close()

    def _serves(self, pipeline: Pipeline[Made] | Inline[Made], epoch: int, step: int) -> bool:
        is_there = self._epoch == epoch and pipeline.position == step
        return is_there and pipeline is self._pipeline and pipeline.is_open

    def _start(self, epoch: int, first: int) -> Pipeline[Made] | Inline[Made]:
        if self._pipeline is not None:
            self._pipeline.close()
        sampler, maker, planning = self.sampler, self._maker, threading.Lock()

        def build(step: int) -> Made:
            with planning:
                users = sampler.batch(epoch, step)
            return maker.make(epoch, step, users)

        self._epoch = epoch
        if self.threads:
            self._pipeline = Pipeline(
                build,
                first=first,
                last=len(sampler),
                threads=self.threads,
                ahead=self.prefetch,
                discard=maker.discard,
            )
        else:
            self._pipeline = Inline(
                build,
                first=first,
                last=len(sampler),
                at_a_time=_at_a_time,
                discard=maker.discard,
            )
        return self._pipeline

    def _count(self, made: Made, depth: int, waited: float) -> None:
        counts = self._counts
        counts.batches += 1
        counts.users += made.assembly.user_offsets[-1]
        counts.events += made.assembly.event_offsets[-1]
        counts.words += made.assembly.layout.num_words
        counts.seconds += waited
        counts.wait_seconds += waited
        counts.ready += depth

    def stats(self) -> LoaderStats:
        """Return what the loader did so far."""
        return self._counts.stats()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; the current epoch keeps its position."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batches delivered so far, and what else decides them."""
        return {**self.sampler.state_dict(), "loader": self._options}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that ``state_dict`` returned.

        Args:
            state: The position.

        Raises:
            CheckpointError: It is incomplete, or belongs to other data or options.
        """
        for name, was in state.get("loader", {}).items():
            if was != self._options.get(name):
                raise CheckpointError(
                    f"loader state: it belongs to {name} {was!r}, the loader has "
                    f"{self._options.get(name)!r}; resume with the options of that run"
                )
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """Stop the threads and release the ring; iterating again starts them again."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._maker.ring.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _at_a_time(made: Made) -> int:
    fitting = _WORDS_AT_A_TIME // max(1, made.assembly.layout.num_words)
    return min(max(fitting, 1), _BATCHES_AT_A_TIME)
