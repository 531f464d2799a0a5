"""Warmup: one rule for the first steps, another one after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pinet_fast.aggregation.rules.base import Rule
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Warmup(Rule):
    """Follow ``before`` for ``steps`` optimizer steps and ``rule`` from then on.

    Steps that a loss scaler skips do not count. While a constant rule is in force a step costs one
    plain backward.

    Args:
        rule: The rule to arrive at: a name, a Rule or a callable.
        steps: Steps to take before, >= 0.
        before: The rule to start with.

    Raises:
        ConfigError: A negative number of steps, or none.

    Source:
        Ours; learning-rate warm-up (Goyal et al., arXiv 1706.02677, section 2.2), on rules.
    """

    def __init__(
        self,
        rule: str | Rule | Callable[[Tensor], Tensor],
        steps: int,
        before: str | Rule | Callable[[Tensor], Tensor] = "joint",
    ) -> None:
        from pinet_fast.aggregation.rules import by_name  # by_name knows every rule

        if not isinstance(steps, int) or steps < 0:
            raise ConfigError(f"Warmup: expected a whole number >= 0 for steps, got {steps!r}")
        self.rule = by_name(rule)
        self.before = by_name(before)
        self.steps = steps
        self._num_steps = 0

    @property
    def active(self) -> Rule:
        """Return the rule in force for the next step."""
        return (self.before if self._num_steps < self.steps else self.rule).active

    def commit(self) -> None:
        """Count a step, and let the rule in force follow it."""
        (self.before if self._num_steps < self.steps else self.rule).commit()
        self._num_steps += 1

    def discard(self) -> None:
        """Let both rules forget the backwards since the last commit."""
        self.before.discard()
        self.rule.discard()

    def state_dict(self) -> dict[str, Any]:
        """Return the steps taken and the state of both rules."""
        return {
            "num_steps": self._num_steps,
            "before": self.before.state_dict(),
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the steps and both rules' state."""
        self._expect(state, {"num_steps", "before", "rule"})
        self.before.load_state_dict(state["before"])
        self.rule.load_state_dict(state["rule"])
        self._num_steps = int(state["num_steps"])

    def __repr__(self) -> str:
        return f"Warmup({self.rule!r}, steps={self.steps}, before={self.before!r})"
