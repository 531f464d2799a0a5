"""Negatives: how many, of which distribution, and which items they never are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from pinet_fast.data._popularity import Popularity
from pinet_fast.data.bound_negatives import BoundNegatives, FrozenNegatives
from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pinet_fast.data.splits import Part, Split
    from pinet_fast.data.store import SequenceStore

Exclude = Literal["history", "window", "targets", "none", "sequence"]
Per = Literal["event", "user", "batch"]
Dist = Literal["uniform", "popularity"]

__all__ = ["BoundNegatives", "Dist", "Exclude", "FrozenNegatives", "Negatives", "Per", "Popularity"]


@dataclass(frozen=True)
class Negatives:
    """How many negatives there are, how they are drawn, and which items are none.

    Attributes:
        n: Negatives of an event, user or batch, at least 1; drawn independently of each other.
        per: ``"event"``: n for every target; ``"user"``: n for every user of a batch; ``"batch"``:
            n for the whole batch.
        dist: ``"uniform"``, or ``"popularity"``: in proportion to (training events of the
            item)^alpha, where an item without any counts as if it had one.
        alpha: Exponent of the popularity.
        exclude: ``"history"``: never an item of the user's training events, read from the
            store's sorted histories (a held-out item may be drawn); ``"window"``: never
            an item of the events that the batch shows of the user, targets included;
            ``"targets"``: per event never its target, per user none of the user's targets;
            ``"none"``: any item but padding; ``"sequence"``: never an item of the user's whole
            sequence. The last one tells training which items are held out, by never pushing them
            down; it is there to compare with published figures that were trained so. Per batch
            these hold for every user of the batch.
        log_q: Whether batches carry the log-probability of every negative.

    Raises:
        ConfigError: Another value of any of them.
    """

    n: int = 1
    exclude: Exclude = "history"
    per: Per = field(default="event", kw_only=True)
    dist: Dist = field(default="uniform", kw_only=True)
    alpha: float = field(default=1.0, kw_only=True)
    log_q: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ConfigError(f"negatives: expected n >= 1, got {self.n!r}")
        for name, kind in (("exclude", Exclude), ("per", Per), ("dist", Dist)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise ConfigError(
                    f"negatives: expected {name} {', '.join(map(repr, known))}, got {value!r}"
                )
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float):
            raise ConfigError(f"negatives: expected alpha to be a number, got {self.alpha!r}")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"negatives: expected a finite alpha, got {self.alpha!r}")

    def bind(self, store: SequenceStore, split: Split, *, seed: int = 0) -> BoundNegatives:
        """Prepare to draw for the users of a store.

        Args:
            store: The store.
            split: Which events are training events.
            seed: Decides, with the epoch, the draws.

        Returns:
            What draws.

        Raises:
            DataError: With ``"history"`` or ``"sequence"``, a user who has every item of the
                catalogue.
        """
        store.check_unchanged()
        popularity = self._popularity(store, split)
        is_whole = self.exclude == "sequence"
        counts = store.lengths() if is_whole else split.train_lengths(store)
        if is_whole or self.exclude == "history":
            full = store.histories.full_users(store.num_items, counts)
            if len(full):
                raise DataError(
                    f"log {store.source}: user {store.user_ids[full[0]]} has all "
                    f"{store.num_items:,} items of the catalogue, so no negative is left; drop "
                    "the user or use Negatives(exclude='none')"
                )
        return BoundNegatives(self, store, counts, seed, popularity)

    def frozen(
        self, store: SequenceStore, split: Split, *, part: Part = "test", seed: int = 0
    ) -> FrozenNegatives:
        """Fix negatives for a sampled evaluation: the same for every epoch, model and batch size.

        They are never the held-out item, nor, with ``exclude="history"``, an item of any event
        before it, or with ``exclude="sequence"`` any item of the user's.

        Args:
            store: The store.
            split: Which events are held out; popularity counts its training events.
            part: ``"valid"`` or ``"test"``, which have negatives of their own.
            seed: Decides the draws.

        Returns:
            What ``evaluation_batches(negatives=...)`` takes.

        Raises:
            ConfigError: ``per`` is not ``"user"`` or ``"event"`` (one target a user, so they are
                the same), or ``exclude`` is ``"window"``.
        """
        if self.per == "batch" or self.exclude == "window":
            raise ConfigError(
                "negatives: frozen ones belong to a user and a target: expected per='user' and "
                f"exclude 'history', 'targets', 'none' or 'sequence', got per={self.per!r}, "
                f"exclude={self.exclude!r}"
            )
        return FrozenNegatives.of(
            self, store, part, seed=seed, popularity=self._popularity(store, split)
        )

    def _popularity(self, store: SequenceStore, split: Split) -> Popularity | None:
        if self.dist == "uniform":
            return None
        return Popularity.of_training_events(store, split, self.alpha)
