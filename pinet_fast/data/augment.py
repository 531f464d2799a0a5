"""Augmentations of training sequences: what they do, and with which targets they may go.

They are applied to indices while a batch is built, one after the other in the order given. What a
user gets depends on (seed, epoch, user) and the number of the augmentation alone, so the stream is
the same for any number of threads and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pinet_fast.errors import ConfigError


@dataclass(frozen=True)
class Crop:
    """Keep a contiguous part of the events, at a random place.

    Attributes:
        share: Of n events ``max(1, floor(share * n))`` stay; above 0, at most 1.

    Raises:
        ConfigError: The share is out of its range.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("Crop", self.share, most=1)


@dataclass(frozen=True)
class Mask:
    """Show a token of its own in place of random events; targets are still the true items.

    Attributes:
        share: Probability of every event; above 0, below 1.
        token: What is shown: 0 (padding), or an id above V, for which the model needs a row.

    Raises:
        ConfigError: A value out of its range.
    """

    share: float
    token: int

    def __post_init__(self) -> None:
        _check_share("Mask", self.share)
        if isinstance(self.token, bool) or not isinstance(self.token, int) or self.token < 0:
            raise ConfigError(f"Mask: expected an integer token >= 0, got {self.token!r}")


@dataclass(frozen=True)
class Reorder:
    """Shuffle a contiguous part of the events, at a random place.

    Only with ``targets="last"`` or None: with a target for every event, one would see its own
    target among the events before it.

    Attributes:
        share: Of n events ``floor(share * n)`` are shuffled; above 0, at most 1.

    Raises:
        ConfigError: The share is out of its range.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("Reorder", self.share, most=1)


@dataclass(frozen=True)
class Drop:
    """Leave random events out; where all would go, the last one stays.

    An event that is left out takes its target along. The target of an event is still the one that
    came next in the log, also where that one is left out itself.

    Attributes:
        share: Probability of every event; above 0, below 1.

    Raises:
        ConfigError: The share is out of its range.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("Drop", self.share)


Augmentation = Crop | Mask | Reorder | Drop


def check_augmentations(
    augment: Augmentation | Sequence[Augmentation], num_items: int, targets: str | None
) -> tuple[Augmentation, ...]:
    """Return the augmentations of a loader as a tuple.

    Args:
        augment: One, or several in the order in which they are applied.
        num_items: V.
        targets: The targets of the loader.

    Raises:
        ConfigError: Something else, a mask token that is an item, or targets that would be wrong.
    """
    chain = (augment,) if isinstance(augment, Augmentation) else augment
    if not isinstance(chain, Sequence) or not all(isinstance(a, Augmentation) for a in chain):
        raise ConfigError(
            f"augment: expected Crop, Mask, Reorder and Drop objects, got {augment!r}"
        )
    for one in chain:
        if isinstance(one, Mask) and 1 <= one.token <= num_items:
            raise ConfigError(
                f"augment: {one} would show an item of the catalogue (1..{num_items:,}); take "
                f"token=0, or token={num_items + 1} and a model with a row for it"
            )
        if isinstance(one, Reorder) and targets == "next":
            raise ConfigError(
                f"augment: {one} with targets='next' would show events their own targets; use "
                "targets='last' or None, or leave it out"
            )
    return tuple(chain)


def _check_share(name: str, share: object, most: float = math.nextafter(1, 0)) -> None:
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not is_number or not 0 < share <= most:  # type: ignore[operator]
        limit = "at most" if most == 1 else "below"
        raise ConfigError(f"{name}: expected a share above 0 and {limit} 1, got {share!r}")
