"""A real optimizer that owns nothing: groups, state and defaults are those of a wrapped one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from pinet_fast.aggregation.joined import JoinedOptimizers

if TYPE_CHECKING:
    from torch import Tensor


class OptimizerWrapper(Optimizer):
    """What schedulers, loss scalers and checkpoints need of an optimizer around another.

    A subclass says what a step is.

    Args:
        inner: The optimizer to wrap, or several joined to one.
    """

    wraps_optimizer = True

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner: Optimizer = inner
        self._alias()

    def _alias(self) -> None:
        """Share the inner optimizer's state, so that both always are one."""
        if isinstance(self.inner, JoinedOptimizers):
            self.inner.refresh()
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self.defaults = self.inner.defaults

    def _parameters(self) -> list[Tensor]:
        """Return the trainable parameters."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _parameter_names(self) -> list[str]:
        """Return the names of the trainable parameters, for messages."""
        names: list[str] = []
        for g, group in enumerate(self.param_groups):
            known = group.get("param_names")
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    names.append(known[i] if known else f"parameter {i} of group {g}")
        return names

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer."""
        if "inner" in self.__dict__:
            self.inner.add_param_group(param_group)
        else:  # called by Optimizer.__init__, before the groups are shared
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the wrapped optimizer."""
        self.inner.load_state_dict(state_dict)
        self._alias()

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inner: Optimizer = state["inner"]
        super().__setstate__({"defaults": inner.defaults})  # sets up the hook registries
        self.inner = inner
        self._alias()
