"""Draws batches of users in which every stratum has its share."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pinet_fast.errors import CheckpointError, ConfigError, StrataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pinet_fast.data.strata import Strata

IntArray = npt.NDArray[np.int64]

STATE_VERSION = 1
_GOLDEN = (math.sqrt(5) - 1) / 2


class StratifiedBatchSampler:
    """Every eligible user once an epoch, in batches that hold each stratum in proportion.

    A batch of b users has the floor or the ceiling of ``b * n_s / N`` users of stratum s (n_s
    eligible users of N), so it is off by less than one user. Users of a stratum are contiguous in
    a batch, strata ascend, and the order inside a stratum is a new random permutation every epoch.

    How: the last, partial batch takes evenly spaced places of the list of all users by stratum;
    the rest of that list is dealt to the F full batches like cards, so that each gets the floor
    or the ceiling of every stratum. Merging the strata into one evenly spaced stream and cutting
    it would be off by up to two users at eight strata. Dealing alone would give the odd users of
    a stratum to neighbouring batches, hence a fixed golden-ratio stride from batch to hand.

    Args:
        strata: The strata.
        batch_size: Users of a batch, at least 1; the last batch holds the rest.
        mix: Shares of the strata; only ``"proportional"`` exists so far.
        seed: Decides, with the epoch, the order; an integer >= 0.
        min_activeness: Only users with that many training events are drawn; a next-event target
            needs 2.
        drop_last: Whether to leave the last, partial batch out (other users every epoch).

    Raises:
        ConfigError: An option out of its range, or no full batch with ``drop_last``.
        StrataError: A stratum without an eligible user.
    """

    def __init__(
        self,
        strata: Strata,
        *,
        batch_size: int,
        mix: str = "proportional",
        seed: int = 0,
        min_activeness: int = 2,
        drop_last: bool = False,
    ) -> None:
        if mix != "proportional":
            raise ConfigError(f"mix: only 'proportional' exists so far, got {mix!r}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("min_activeness", min_activeness, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ConfigError(f"{name}: expected an integer >= {least}, got {value!r}")
        self.strata = strata
        self.batch_size = int(batch_size)
        self.min_activeness = int(min_activeness)
        self.drop_last = bool(drop_last)
        self.seed = int(seed)
        self.epoch = 0
        self._step = 0
        self._members = _members(strata, self.min_activeness)
        self._plan(np.array([len(users) for users in self._members], np.int64))
        options = [strata.fingerprint, self.batch_size, mix, self.min_activeness, self.drop_last]
        self.fingerprint = hashlib.sha256(json.dumps(options).encode()).hexdigest()
        self._orders: tuple[tuple[int, int], list[IntArray]] | None = None

    def _plan(self, counts: IntArray) -> None:
        total = int(counts.sum())
        self._num_full, rest = divmod(total, self.batch_size)
        starts = np.concatenate(([0], np.cumsum(counts)))
        # Place i of the last batch is number floor((2i + 1) N / 2r) in the list of all users.
        places = (2 * np.arange(rest) + 1) * total // (2 * max(rest, 1))
        last = np.bincount(np.searchsorted(starts, places, side="right") - 1, minlength=len(counts))
        self._dealt = counts - last  # [S], users of the full batches
        self._deal_starts = np.concatenate(([0], np.cumsum(self._dealt)))[:-1]
        self._num_batches = self._num_full + (1 if rest and not self.drop_last else 0)
        if self._num_batches == 0:
            raise ConfigError(
                f"batch_size: {self.batch_size:,} with drop_last leaves no batch of {total:,} "
                "users; lower batch_size or keep the last batch"
            )
        self._stride = _golden_stride(self._num_full)

    @property
    def num_users(self) -> int:
        """Return the number of eligible users, N."""
        return sum(len(users) for users in self._members)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self._num_batches

    def batch(self, epoch: int, step: int) -> IntArray:
        """Return any batch, without changing the position.

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
        orders = self._orders_of(epoch)
        parts = []
        for s, order in enumerate(orders):
            if step == self._num_full:
                parts.append(order[self._dealt[s] :])
            else:
                hand = step * self._stride % self._num_full
                first = (hand - self._deal_starts[s]) % self._num_full
                parts.append(order[first : self._dealt[s] : self._num_full])
        return np.concatenate(parts)

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
                "sampler state: it belongs to another log, split, strata, batch_size or "
                "min_activeness; resume with the options of that run"
            )
        position = [state.get(name) for name in ("seed", "epoch", "step")]
        numbers = [value for value in position if isinstance(value, int) and value >= 0]
        if len(numbers) < len(position) or numbers[-1] >= self._num_batches:
            raise CheckpointError(
                f"sampler state: expected seed, epoch >= 0 and step < {self._num_batches}, "
                f"got {', '.join(map(str, position))}; the checkpoint is damaged"
            )
        self.seed, self.epoch, self._step = numbers

    def _orders_of(self, epoch: int) -> list[IntArray]:
        key = (self.seed, epoch)
        if self._orders is None or self._orders[0] != key:
            orders = [
                _generator(self.seed, epoch, s).permutation(users)
                for s, users in enumerate(self._members)
            ]
            self._orders = (key, orders)
        return self._orders[1]


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


def _generator(seed: int, epoch: int, stratum: int) -> np.random.Generator:
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch, stratum))
    return np.random.Generator(np.random.Philox(sequence))


def _golden_stride(num_full: int) -> int:
    stride = max(1, round(num_full * _GOLDEN))
    while math.gcd(stride, max(num_full, 1)) != 1:
        stride += 1
    return stride
