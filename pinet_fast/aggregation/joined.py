"""Several optimizers as one, such as Adam for a network and SparseAdam for its item table."""

from __future__ import annotations

from collections import ChainMap
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from pinet_fast.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def joined(opt: Optimizer | Sequence[Optimizer]) -> Optimizer:
    """Return the one optimizer given, or several as one.

    Raises:
        ConfigError: Something else than optimizers, or what wraps one already.
    """
    for one in opt if isinstance(opt, list | tuple) else (opt,):
        if not isinstance(one, Optimizer):
            raise ConfigError(
                "GradientAggregator: expected a torch.optim.Optimizer or a list of them, got "
                f"{type(one).__name__}; wrap the optimizer you have, as in "
                "GradientAggregator(torch.optim.Adam(model.parameters()))"
            )
        if getattr(one, "wraps_optimizer", False):
            raise ConfigError("GradientAggregator: the optimizer is wrapped already")
    return opt if isinstance(opt, Optimizer) else JoinedOptimizers(opt)


class JoinedOptimizers(Optimizer):
    """Optimizers that step together.

    The parameter groups are theirs, in order, so schedulers and loss scalers see one optimizer.

    Args:
        optimizers: At least one; no parameter may belong to two of them.

    Raises:
        ConfigError: No optimizer, or a parameter in two of them.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        if not self.optimizers:
            raise ConfigError("GradientAggregator: expected at least one optimizer, got none")
        groups = [group for opt in self.optimizers for group in opt.param_groups]
        ids = [id(p) for group in groups for p in group["params"]]
        if len(set(ids)) < len(ids):
            raise ConfigError(
                "GradientAggregator: the optimizers share a parameter, which two of them would "
                "step; give each parameter to one"
            )
        self._is_made = False
        super().__init__(groups, {})
        self._is_made = True
        self.refresh()

    def refresh(self) -> None:
        """Take over groups and state from the optimizers, which own them."""
        self.param_groups = [group for opt in self.optimizers for group in opt.param_groups]
        self.state = ChainMap(*(opt.state for opt in self.optimizers))  # type: ignore[assignment]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every optimizer."""
        for opt in self.optimizers:
            opt.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: it is not clear which optimizer is meant.

        Raises:
            ConfigError: Always, once constructed.
        """
        if self._is_made:
            raise ConfigError(
                "add_param_group: several optimizers are wrapped; call add_param_group of the one "
                "that is to have the parameters"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return one state, parameters numbered through all optimizers in order."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for opt in self.optimizers:
            part = opt.state_dict()
            state |= {first + i: value for i, value in part["state"].items()}
            for group in part["param_groups"]:
                ids = [first + i for i in group["params"]]
                groups += [{**group, "params": ids}]
            first += _num_parameters(opt)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hand every optimizer its part.

        Raises:
            CheckpointError: Another number of groups or parameters.
        """
        groups = state_dict["param_groups"]
        expected = [len(group["params"]) for group in self.param_groups]
        got = [len(group["params"]) for group in groups]
        if expected != got:
            raise CheckpointError(
                f"load_state_dict: expected parameter groups of {expected} parameters, got {got}; "
                "the state belongs to other optimizers"
            )
        first = first_group = 0
        for opt in self.optimizers:
            past, past_group = first + _num_parameters(opt), first_group + len(opt.param_groups)
            opt.load_state_dict(
                {
                    "state": {
                        i - first: value
                        for i, value in state_dict["state"].items()
                        if first <= i < past
                    },
                    "param_groups": [
                        {**group, "params": [i - first for i in group["params"]]}
                        for group in groups[first_group:past_group]
                    ],
                }
            )
            first, first_group = past, past_group
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["optimizers"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"JoinedOptimizers({self.optimizers!r})"


def _num_parameters(opt: Optimizer) -> int:
    return sum(len(group["params"]) for group in opt.param_groups)
