"""Builds one batch into a block: pure in (seed, epoch, step), so that any thread may do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from pinet_fast import profiling
from pinet_fast.data import _njit, _prefetch
from pinet_fast.data._assemble import Assembly, spans_of
from pinet_fast.data._augmenting import Augmenter, Sources
from pinet_fast.data._blocks import Layout, Slot
from pinet_fast.data.augment import check_augmentations
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pinet_fast.data.augment import Augmentation
    from pinet_fast.data.bound_negatives import BoundNegatives
    from pinet_fast.data.splits import Split
    from pinet_fast.data.store import SequenceStore
    from pinet_fast.data.strata import Strata

CropName = Literal["tail", "random_window", "prefix"]
Targets = Literal["next", "last"]
IntArray = npt.NDArray[np.int64]

_CROPS = {"tail": _njit.TAIL, "random_window": _njit.RANDOM_WINDOW, "prefix": _njit.PREFIX}
_STREAM = 2  # parts the crops from the negatives, which have 1, 3 and 4


@dataclass(eq=False)
class _Plan:
    """Windows of the users of one batch, as ``_njit.plan`` writes them."""

    users: IntArray
    starts: IntArray
    ends: IntArray
    positions: IntArray
    offsets: IntArray
    strata_ids: IntArray
    sources: Sources | None = None  # of the events, where they are augmented

    @classmethod
    def empty(cls, users: IntArray) -> _Plan:
        num = len(users)
        starts, ends, positions, ids = (np.empty(num, np.int64) for _ in range(4))
        return cls(users, starts, ends, positions, np.empty(num + 1, np.int64), ids)


class BatchBuilder:
    """Cuts the windows of a batch of users, and fills a block with everything the batch holds.

    Args:
        store: The sequences.
        split: Which events are training events; no other is read.
        strata: Strata of the users.
        max_len: Events of a sequence at most.
        crop: Which events of a user; see ``RaggedLoader``.
        augment: What is done to them.
        targets: What is to be predicted.
        negatives: What draws negatives, or None.
        stratum_weights: Weight of the users of every stratum, float64 [S], or None for 1.
        seed: Decides, with the epoch, the crops.
    """

    def __init__(
        self,
        store: SequenceStore,
        *,
        split: Split,
        strata: Strata,
        max_len: int,
        crop: CropName,
        augment: Augmentation | Sequence[Augmentation],
        targets: Targets | None,
        negatives: BoundNegatives | None,
        stratum_weights: npt.NDArray[np.float64] | None,
        seed: int,
    ) -> None:
        if crop not in get_args(CropName):
            raise ConfigError(
                f"crop: expected {', '.join(map(repr, get_args(CropName)))}, got {crop!r}"
            )
        if targets is not None and targets not in get_args(Targets):
            raise ConfigError(f"targets: expected 'next', 'last' or None, got {targets!r}")
        if targets is None and negatives is not None:
            options = negatives.options
            if options.per == "event" or options.exclude == "targets":
                raise ConfigError(
                    "negatives: per='event' and exclude='targets' need targets; use "
                    "targets='next' or 'last', or per='user' with another exclude"
                )
        store.check_unchanged()
        starts = store.offsets[:-1]
        self._spans = spans_of(starts, split.train_ends(store) - starts, strata)
        self._store = store
        self._num_strata = strata.num_strata
        self._stratum_numbers = np.arange(strata.num_strata + 1)
        self._crop = _CROPS[crop]
        self._targets = targets
        self._shift = 0 if targets is None else 1
        self._window = max_len + self._shift
        self._negatives = negatives
        self._weights = _weights(stratum_weights)
        self._seed = seed
        chain = check_augmentations(augment, store.num_items, targets)
        self._augmenter = Augmenter(chain, seed) if chain else None

    def build(
        self, epoch: int, step: int, users: IntArray, take: Callable[[int], Slot]
    ) -> tuple[Slot, Assembly]:
        """Fill a block with the batch of some users.

        Args:
            epoch: From 0.
            step: Batch of the epoch.
            users: Row numbers of the store, int64 [B], grouped by ascending stratum.
            take: Returns a slot of at least so many words.

        Returns:
            The filled slot, and what turns it into a batch.

        Raises:
            StoreError: The file of the store was written to.
        """
        self._store.check_unchanged()
        with profiling.PLAN:
            plan = self._plan(epoch, users)
        assembly = self._assembly(plan)
        slot = take(assembly.layout.num_words)
        parts = assembly.layout.arrays(slot.memory.numpy())
        parts["users"][:], parts["offsets"][:] = users, plan.offsets
        parts["strata_ids"][:] = plan.strata_ids
        np.subtract(plan.offsets[1:], plan.offsets[:-1], out=parts["lengths"])
        borders = assembly.event_offsets
        for s in range(self._num_strata):
            parts["event_ids"][borders[s] : borders[s + 1]] = s
        if self._weights is not None:
            parts["weights"][:] = self._weights[plan.strata_ids]
        with profiling.GATHER:
            self._gather(plan, parts)
        if self._negatives is not None:
            with profiling.NEGATIVES:
                self._draw(epoch, step, plan, parts)
        return slot, assembly

    def _plan(self, epoch: int, users: IntArray) -> _Plan:
        key = np.uint64(0)
        if self._crop != _njit.TAIL:
            sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch, _STREAM))
            key = sequence.generate_state(1, np.uint64)[0]
        plan = _Plan.empty(users)
        _prefetch.plan(
            self._spans, users, self._crop, self._window, self._shift, key,
            plan.starts, plan.ends, plan.positions, plan.offsets, plan.strata_ids,
        )  # fmt: skip
        if self._augmenter is not None:
            plan.sources = self._augmenter.sources(
                epoch, users, plan.starts, plan.ends - self._shift, plan.positions
            )
            plan.offsets = plan.sources.offsets
        return plan

    def _assembly(self, plan: _Plan) -> Assembly:
        num_users, num_events = len(plan.users), int(plan.offsets[-1])
        borders = plan.strata_ids.searchsorted(self._stratum_numbers)
        layout = Layout()
        layout.add("values", num_events)
        num_targets = num_events if self._targets == "next" else num_users
        if self._targets is not None:
            layout.add("targets", num_targets)
        layout.add("event_ids", num_events)
        layout.add("offsets", num_users + 1)
        for name in ("users", "strata_ids", "lengths"):
            layout.add(name, num_users)
        if self._negatives is not None:
            shape = self._negatives.shape(num_targets, num_users)
            layout.add("negatives", *shape)
            if self._negatives.options.log_q:
                layout.add("negatives_log_q", *shape, dtype=np.float32)
        if self._weights is not None:
            layout.add("weights", num_users, dtype=np.float32)
        return Assembly(
            layout,
            max_len=int((plan.offsets[1:] - plan.offsets[:-1]).max(initial=0)),
            user_offsets=tuple(borders.tolist()),
            event_offsets=tuple(plan.offsets[borders].tolist()),
        )

    def _gather(self, plan: _Plan, parts: dict[str, npt.NDArray[np.int64]]) -> None:
        items, starts, ends, offsets = self._store.items, plan.starts, plan.ends, plan.offsets
        if plan.sources is not None:
            plan.sources.gather(items, parts["values"], parts.get("targets"))
            return
        if self._targets == "next":
            _prefetch.gather_next(items, starts, ends, offsets, parts["values"], parts["targets"])
            return
        _prefetch.gather(items, starts, ends - self._shift, offsets, parts["values"])
        if self._targets == "last":
            parts["targets"][:] = items[ends - 1]

    def _draw(
        self, epoch: int, step: int, plan: _Plan, parts: dict[str, npt.NDArray[np.int64]]
    ) -> None:
        assert self._negatives is not None
        first_positions, offsets = plan.positions + 1, plan.offsets
        if self._targets == "last":
            first_positions = plan.positions + (plan.ends - plan.starts) - 1
            offsets = np.arange(len(plan.users) + 1)
        log_q = parts.get("negatives_log_q")
        self._negatives.draw(
            epoch,
            plan.users,
            first_positions,
            offsets,
            step=step,
            starts=plan.starts,
            ends=plan.ends,
            targets=parts.get("targets"),
            out=parts["negatives"],
            log_q=None if log_q is None else log_q.view(np.float32),
        )


def fresh_slot(num_words: int) -> Slot:
    """Return memory of exactly that size that nobody lends again."""
    return Slot(torch.from_numpy(np.empty(num_words, np.int64)))


def _weights(by_stratum: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float32] | None:
    if by_stratum is None or bool((np.asarray(by_stratum) == 1).all()):
        return None
    return np.asarray(by_stratum, np.float32)
