"""What a rule is: it turns stratum gradients, or what is known of them, into one gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from pinet_fast.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Claim = Literal["convex", "non_conflicting", "scale_invariant", "equivariant", "mean"]
"""What a rule may promise; the contract tests hold it to that.

``convex``: weights >= 0 that sum to one. ``non_conflicting``: the result has no negative inner
product with a stratum gradient. ``scale_invariant``: scaling all gradients scales the result.
``equivariant``: the order of the strata does not matter. ``mean``: equal gradients give their mean.
"""


@dataclass(frozen=True)
class BatchStrata:
    """What a rule may know about a batch before its backward.

    Attributes:
        counts: Loss rows (users or events) of every stratum, or their summed row weights, S
            numbers; 0 = absent from the batch.
        user_counts: Users of every stratum in the population, or None where unknown.
        event_counts: Training events of every stratum in the population, or None.
        renormalise: Whether the strata that are present share the weight of absent ones.
    """

    counts: tuple[float, ...]
    user_counts: tuple[int, ...] | None = None
    event_counts: tuple[int, ...] | None = None
    renormalise: bool = True

    @property
    def present(self) -> tuple[bool, ...]:
        """Return which strata have rows in the batch."""
        return tuple(count > 0 for count in self.counts)


class Rule(ABC):  # noqa: B024 - what is abstract differs by tier
    """A rule: a ConstantRule, a GramRule, an ElementwiseRule, or a schedule of these.

    State, where a rule has any, changes in :meth:`commit` only, which the aggregator calls in
    ``step()``: a step that a loss scaler skips leaves nothing behind.

    Attributes:
        claims: What the rule promises.
    """

    claims: frozenset[Claim] = frozenset()

    @property
    def active(self) -> Rule:
        """Return the rule in force for the next step; ``self`` but for schedules."""
        return self

    def commit(self) -> None:  # noqa: B027 - most rules have no state
        """Make the state follow the backwards since the last commit: their step was taken."""

    def discard(self) -> None:  # noqa: B027
        """Forget the backwards since the last commit: their gradients were cleared."""

    def state_dict(self) -> dict[str, Any]:
        """Return the committed state; empty for rules without state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a committed state.

        Raises:
            CheckpointError: The state belongs to another rule.
        """
        self._expect(state, set())

    def _expect(self, state: dict[str, Any], keys: set[str]) -> None:
        if set(state) != keys:
            raise CheckpointError(
                f"{type(self).__name__}.load_state_dict: expected the keys {sorted(keys)}, got "
                f"{sorted(state)}; the checkpoint belongs to another rule"
            )


class ConstantRule(Rule):
    """A rule whose weights are known before the backward (tier A).

    It costs nothing: the losses are reweighted and one ordinary backward runs, without stratum
    gradients.
    """

    @abstractmethod
    def weights(self, batch: BatchStrata) -> tuple[float, ...]:
        """Return one weight a stratum; 0 for absent ones."""


class GramRule(Rule):
    """A rule whose weights depend on the stratum gradients through their Gram only (tier B).

    A rule of your own is one class with :meth:`weights`.

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

    def stratum_weights(self, gram: Tensor, present: Sequence[bool]) -> Tensor:
        """Return the weights of all S strata; absent ones weigh 0 and are not shown to the rule.

        Args:
            gram: float64 [S, S] or [P, S, S].
            present: Which strata have rows in the batch, S values known on the host.
        """
        if all(present):
            return self.weights(gram)
        kept = torch.tensor([s for s, here in enumerate(present) if here], device=gram.device)
        known = self.weights(gram.index_select(-1, kept).index_select(-2, kept))
        return gram.new_zeros(gram.shape[:-1]).index_copy_(-1, kept, known)


class ElementwiseRule(Rule):
    """A rule that needs the stratum gradients themselves (tier C).

    A rule of your own is one class with :meth:`combine`.
    """

    @abstractmethod
    def combine(self, gradients: Tensor, touched: Tensor | None) -> Tensor:
        """Return the combined gradient of one parameter.

        Args:
            gradients: Of the K strata that are present, [K, *shape]; for lookups [K, U, d], the U
                item rows that some stratum touched.
            touched: For lookups, bool [K, U]: which strata touched an item row; only these count
                there. None = all count everywhere.

        Returns:
            [*shape] or [U, d].
        """

    def aggregate(
        self, gradients: Tensor, touched: Tensor | None, present: Sequence[bool]
    ) -> Tensor:
        """Return :meth:`combine` of the strata that are present.

        NaN and infinity stay visible, whatever the rule drops: an overflow under a loss scaler
        must skip the step.

        Args:
            gradients: [S, *shape] or [S, U, d].
            touched: bool [S, U] or None.
            present: Which strata have rows in the batch, S values known on the host.
        """
        if not all(present):
            kept = torch.tensor([s for s, here in enumerate(present) if here])
            kept = kept.to(gradients.device)
            gradients = gradients.index_select(0, kept)
            touched = None if touched is None else touched.index_select(0, kept)
        return self.combine(gradients, touched) + (gradients * 0).sum(0)
