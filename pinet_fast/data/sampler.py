"""Draws batches of users in which every stratum has its share."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pinet_fast import profiling
from pinet_fast.data import _planning
from pinet_fast.data._order import order, order_within
from pinet_fast.data._quotas import Mix, shares_of
from pinet_fast.errors import CheckpointError, ConfigError, StrataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pinet_fast.data.strata import Strata

IntArray = npt.NDArray[np.int64]

STATE_VERSION = 2  # 1 drew its permutations from Philox


class StratifiedBatchSampler:
    """Batches of users with a fixed share of every stratum, in an order that takes no memory.

    Users of a stratum are contiguous in a batch and strata ascend. The order inside a stratum is a
    keyed permutation by (seed, stratum, cycle), so that any batch of any epoch is found at once:
    the position is (seed, epoch, step) and nothing else.

    ``mix="proportional"``: every eligible user once an epoch. A batch of b users has the floor or
    the ceiling of ``b * n_s / N`` users of stratum s (n_s eligible users of N).

    Any other mix: the strata go through their users again and again, a new permutation each time
    (a cycle), and the epoch is merely a number of batches. All batches are full. Fractions of a
    user are carried from batch to batch and epoch to epoch, so that after any number of batches a
    stratum is at most ceil(log2 S) / 2 users off its share: half a user for two strata. A user may
    come twice in a batch where a cycle ends inside it.

    ``batch_size`` and ``max_events`` are those of the global batch. Of its rows, rank r of W gets
    rows r, r + W, r + 2W, ...: disjoint, together the whole batch, of every stratum the floor or
    the ceiling of its W-th part, and as many batches on every rank. The stream of global batches
    does not depend on the world size, so a state may be loaded into another one.

    With ``max_events`` the number of batches is fixed as well, and no batch of any epoch has more
    events than that. For this, users of a stratum are permuted among those of similar length, and
    a batch takes one of each similar length. Lengths are those of a loader of next-event targets:
    the training events but one, at most ``max_len``.

    Args:
        strata: The strata.
        batch_size: Users of a global batch, at least 1; the last batch of ``"proportional"`` holds
            the rest. Give this or ``max_events``.
        max_events: Most events of a global batch.
        mix: ``"proportional"``, ``"uniform"``, ``"sqrt"`` (by the root of the users), a share above
            0 for every stratum by number or name, ``{"tail": 0.5, "head": 0.5}``, or a sequence of
            S shares; shares have the sum 1.
        seed: Decides, with the epoch, the order; an integer >= 0.
        min_activeness: Only users with that many training events are drawn; a next-event target
            needs 2.
        drop_last: Whether to leave the last, partial batch out (other users every epoch).
        max_len: Events of a user that count for ``max_events`` at most; that of the loader.
        steps_per_epoch: Batches of an epoch of a mix that is not proportional; by default, as many
            as hold N users.
        rank: This process, 0..world_size - 1. Without rank and world_size, those of
            ``torch.distributed`` where it is initialised (torchrun), else one process.
        world_size: Processes that share a batch.

    Attributes:
        batch_size: Users of a global batch at most.
        stratum_weights: Weight of a user of every stratum that makes the mean over a batch estimate
            the mean over all users (Horvitz-Thompson), ``(n_s / N) / share_s``, float64 [S]; 1 for
            ``"proportional"``.
        fingerprint: Hex digest of the strata and the options that decide the global batches.

    Raises:
        ConfigError: An option out of its range, no full batch with ``drop_last``, or a batch with
            fewer users than ranks.
        StrataError: A stratum without an eligible user.
    """

    def __init__(
        self,
        strata: Strata,
        *,
        batch_size: int | None = None,
        max_events: int | None = None,
        mix: Mix = "proportional",
        seed: int = 0,
        min_activeness: int = 2,
        drop_last: bool = False,
        max_len: int | None = None,
        steps_per_epoch: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if (batch_size is None) == (max_events is None):
            raise ConfigError(
                "sampler: expected one of batch_size and max_events, "
                f"got {'neither' if batch_size is None else 'both'}"
            )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_events", max_events, 1),
            ("seed", seed, 0),
            ("min_activeness", min_activeness, 1),
            ("max_len", max_len, 1),
            ("steps_per_epoch", steps_per_epoch, 1),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
        ):
            _check_integer(name, value, least)
        rank, world_size = _ranks(rank, world_size)
        if rank >= world_size:
            raise ConfigError(f"rank: expected less than world_size {world_size}, got {rank}")
        self.strata = strata
        self.min_activeness = int(min_activeness)
        self.drop_last = bool(drop_last)
        self.seed = int(seed)
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._step = 0
        self._members = _members(strata, self.min_activeness)
        counts = np.array([len(users) for users in self._members], np.int64)
        shares = shares_of(mix, strata.names, counts.tolist())
        self.stratum_weights = counts / counts.sum() / np.array(shares, np.float64)
        limit = int(batch_size or max_events or 0)
        steps = None if steps_per_epoch is None else int(steps_per_epoch)
        self._has_segments = max_events is not None
        lengths = None
        if self._has_segments:
            lengths = _sort_by_length(self._members, strata.activeness, max_len)
        if isinstance(mix, str) and mix == "proportional":
            self.stratum_weights = np.ones(len(counts))
            if steps is not None:
                raise ConfigError(
                    "steps_per_epoch: an epoch of mix 'proportional' is every user once; "
                    "leave it out or choose another mix"
                )
            sized = _planning.deal(counts, lengths, limit, self.drop_last)
        else:
            sized = _planning.stream(counts, lengths, shares, limit, self.drop_last, steps)
        self._plan, self.batch_size, smallest = sized
        self._num_batches = self._plan.num_batches
        if smallest < self.world_size:
            raise ConfigError(
                f"world_size: the smallest batch has {smallest:,} users for {self.world_size} "
                "ranks; choose another batch_size or max_events, or drop_last"
            )
        longest = None if max_events is None or max_len is None else int(max_len)
        options = [
            *(strata.fingerprint, type(self._plan).__name__, self._has_segments, limit, longest),
            *(self.min_activeness, self.drop_last, self._num_batches, list(map(str, shares))),
        ]
        self.fingerprint = hashlib.sha256(json.dumps(options).encode()).hexdigest()

    @property
    def num_users(self) -> int:
        """Return the number of eligible users, N."""
        return sum(len(users) for users in self._members)

    def __len__(self) -> int:
        """Return the number of batches of an epoch, the same on every rank."""
        return self._num_batches

    def batch(self, epoch: int, step: int) -> IntArray:
        """Return any batch, or this rank's part of it, without changing the position.

        Args:
            epoch: From 0.
            step: Batch of the epoch, 0..len - 1.

        Returns:
            Users as row numbers of the store, int64 [B], grouped by ascending stratum.

        Raises:
            IndexError: No such epoch or step.
        """
        if epoch < 0 or not 0 <= step < self._num_batches:
            raise IndexError(f"batch {step} of epoch {epoch}: an epoch has {self._num_batches}")
        parts, row = [], 0
        with profiling.DRAW:
            for stratum, cycle, places in self._plan.draws(epoch, step):
                own = places[(self.rank - row) % self.world_size :: self.world_size]
                row += len(places)
                if own:
                    parts.append(self._users(stratum, cycle, own))
            return np.concatenate(parts)

    def _users(self, stratum: int, cycle: int, own: range) -> IntArray:
        members = self._members[stratum]
        places = np.arange(own.start, own.stop, own.step)
        if self._has_segments:
            numbers, starts, sizes, positions = self._plan.segments(stratum, places)
            found = order_within(self.seed, stratum, cycle, numbers, sizes, positions)
            return np.take(members, starts + found)
        return np.take(members, order(self.seed, stratum, cycle, len(members), places))

    def __iter__(self) -> Iterator[IntArray]:
        """Yield the batches from the current position to the end of the epoch, then advance it."""
        while self._step < self._num_batches:
            users = self.batch(self.epoch, self._step)
            self._step += 1
            yield users
        self.epoch += 1
        self._step = 0

    @property
    def step(self) -> int:
        """Return how many batches of the current epoch were given out."""
        return self._step

    def count(self, epoch: int, step: int) -> None:
        """Note that a batch, which :meth:`batch` told, was given out: the position is after it.

        Args:
            epoch: From 0.
            step: Batch of the epoch; after the last one the position is the end of the epoch.
        """
        self.epoch, self._step = epoch, step + 1

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; the current epoch keeps its position.

        Args:
            epoch: From 0.

        Raises:
            ConfigError: It is negative.
        """
        if epoch < 0:
            raise ConfigError(f"epoch: expected an integer >= 0, got {epoch}")
        if epoch != self.epoch:
            self.epoch, self._step = int(epoch), 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batches given out so far: ints and a fingerprint."""
        is_end = self._step == self._num_batches
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "epoch": self.epoch + is_end,
            "step": 0 if is_end else self._step,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; the batches that follow are the same as without the interruption.

        Args:
            state: What ``state_dict`` returned, here or in an equal sampler.

        Raises:
            CheckpointError: The state is incomplete, or of other data, strata or options.
        """
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"sampler state: expected version {STATE_VERSION}, got {state.get('version')}; "
                "resume with the version of pinet_fast that wrote it"
            )
        if state.get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                "sampler state: it belongs to another log, split, strata, mix, batch_size, "
                "max_events or min_activeness; resume with the options of that run"
            )
        position = [state.get(name) for name in ("seed", "epoch", "step")]
        numbers = [value for value in position if isinstance(value, int) and value >= 0]
        if len(numbers) < len(position) or numbers[-1] >= self._num_batches:
            raise CheckpointError(
                f"sampler state: expected seed, epoch >= 0 and step < {self._num_batches}, "
                f"got {', '.join(map(str, position))}; the checkpoint is damaged"
            )
        self.seed, self.epoch, self._step = numbers


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    group = torch.distributed
    if rank is None and world_size is None and group.is_available() and group.is_initialized():
        return group.get_rank(), group.get_world_size()
    return int(rank or 0), 1 if world_size is None else int(world_size)


def _members(strata: Strata, min_activeness: int) -> list[IntArray]:
    is_eligible = strata.activeness >= min_activeness
    members = [np.flatnonzero(is_eligible & (strata.ids == s)) for s in range(strata.num_strata)]
    for s, users in enumerate(members):
        if len(users) == 0:
            raise StrataError(
                f"strata {strata.spec!r}: no user of stratum {s} ({strata.names[s]}) has "
                f"{min_activeness} training events, so it cannot be trained; raise its upper edge"
            )
    return members


def _sort_by_length(
    members: list[IntArray], activeness: IntArray, max_len: int | None
) -> list[IntArray]:
    """Sort the users of every stratum by their input events, in place, and return these."""
    lengths = []
    for s, users in enumerate(members):
        events = np.clip(activeness[users] - 1, 1, max_len)
        ascending = np.argsort(events, kind="stable")
        members[s] = users[ascending]
        lengths.append(events[ascending])
    return lengths


def _check_integer(name: str, value: object, least: int) -> None:
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if value is not None and not (is_integer and value >= least):  # type: ignore[operator]
        raise ConfigError(f"{name}: expected an integer >= {least}, got {value!r}")
