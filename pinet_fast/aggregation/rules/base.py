"""What a rule is: it turns stratum gradients, or what is known before them, into weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BatchStrata:
    """What a rule may know about a batch before its backward.

    Attributes:
        counts: Loss rows (users or events) of every stratum, or their summed row weights, S
            numbers; 0 = absent from the batch.
        user_counts: Users of every stratum in the population, or None where unknown.
        event_counts: Training events of every stratum in the population, or None.
    """

    counts: tuple[float, ...]
    user_counts: tuple[int, ...] | None = None
    event_counts: tuple[int, ...] | None = None

    @property
    def present(self) -> tuple[bool, ...]:
        """Return which strata have rows in the batch."""
        return tuple(count > 0 for count in self.counts)


class ConstantRule(ABC):
    """A rule whose weights are known before the backward (tier A).

    It costs nothing: the losses are reweighted and one ordinary backward runs, without stratum
    gradients.
    """

    @abstractmethod
    def weights(self, batch: BatchStrata) -> tuple[float, ...]:
        """Return one weight a stratum; 0 for absent ones."""


class GramRule(ABC):
    """A rule whose weights depend on the stratum gradients through their Gram only (tier B).

    Attributes:
        per_parameter: Whether every parameter has weights of its own.
    """

    per_parameter: bool = False

    @abstractmethod
    def weights(self, gram: Tensor) -> Tensor:
        """Return the weights of the strata that are present.

        Args:
            gram: Inner products of the K present strata's gradients, float64, [K, K]; with
                ``per_parameter`` [P, K, K].

        Returns:
            float64 [K] or [P, K].
        """


Rule = ConstantRule | GramRule
