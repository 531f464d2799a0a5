"""EMA: another rule's weights, averaged over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pinet_fast.aggregation.rules.base import GramRule, Rule
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


class EMA(GramRule):
    """Smooth the weights of a whole-model Gram rule: ``e <- beta e + (1 - beta) w``, used as e.

    Kept per stratum as multiples of the mean's weight ``1 / K``, so that batches without some
    stratum fit in; the average of an absent stratum stays, and one seen for the first time starts
    at its own weight. Convex rules stay convex.

    Within one step every backward sees the average as it was at the last ``step()``; the step then
    blends in the mean of their weights. Weights that are not finite are left out.

    Args:
        rule: A rule of whole-model weights: a name, a GramRule or a callable.
        beta: Share of the past, in [0, 1).

    Raises:
        ConfigError: A share out of range, or a rule whose weights are constant, per parameter or
            none.

    Source:
        The smoothed weights of Zhou et al., On the convergence of stochastic multi-objective
        gradient manipulation and beyond (NeurIPS 2022), CR-MOGM.
    """

    def __init__(self, rule: str | Rule | Callable[[Tensor], Tensor], beta: float = 0.9) -> None:
        from pinet_fast.aggregation.rules import by_name  # by_name knows every rule

        if not 0 <= beta < 1:
            raise ConfigError(f"EMA: expected 0 <= beta < 1, got {beta}")
        inner = by_name(rule)
        if not isinstance(inner, GramRule) or inner.per_parameter:
            hint = "; pass per_parameter=False" if isinstance(inner, GramRule) else ""
            raise ConfigError(
                f"EMA: expected a Gram rule with weights for the whole model, got {inner!r}{hint}"
            )
        self.rule = inner
        self.beta = beta
        self.claims = inner.claims - {"non_conflicting"}
        self._average: Tensor | None = None  # [S]; NaN = never seen
        self._sum: Tensor | None = None
        self._num_backwards = 0

    def weights(self, gram: Tensor) -> Tensor:
        """Return the smoothed weights where all strata are present."""
        return self.stratum_weights(gram, [True] * gram.shape[-1])

    def stratum_weights(self, gram: Tensor, present: Sequence[bool]) -> Tensor:
        """Return the smoothed weights of all S strata; absent ones weigh 0."""
        fresh = self.rule.stratum_weights(gram, present) * sum(present)
        absent = None if all(present) else ~torch.tensor(present, device=gram.device)
        if absent is not None:
            fresh = fresh.masked_fill(absent, torch.nan)
        self._sum = fresh if self._sum is None else self._sum + fresh
        self._num_backwards += 1
        mixed = self._blend(fresh) / sum(present)
        if absent is not None:
            mixed = mixed.masked_fill(absent, 0.0)
        return mixed / mixed.sum() if "convex" in self.claims else mixed

    def _blend(self, fresh: Tensor) -> Tensor:
        if self._average is None:
            return fresh
        average = self._average.to(fresh.device)
        return torch.where(average.isnan(), fresh, self.beta * average + (1 - self.beta) * fresh)

    def commit(self) -> None:
        """Blend in the mean weights of the backwards since the last commit."""
        if self._sum is not None:
            fresh = self._sum / self._num_backwards
            old = fresh.new_full(fresh.shape, torch.nan) if self._average is None else self._average
            self._average = torch.where(fresh.isfinite(), self._blend(fresh), old.to(fresh.device))
        self.rule.commit()
        self.discard()

    def discard(self) -> None:
        """Forget the backwards since the last commit."""
        self._sum, self._num_backwards = None, 0
        self.rule.discard()

    def state_dict(self) -> dict[str, Any]:
        """Return the average, and the state of the inner rule."""
        return {"average": self._average, "rule": self.rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over an average; backwards since the last commit are forgotten."""
        self._expect(state, {"average", "rule"})
        self.rule.load_state_dict(state["rule"])
        self._average = state["average"]
        self.discard()

    def __repr__(self) -> str:
        return f"EMA({self.rule!r}, beta={self.beta})"
