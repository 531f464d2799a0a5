"""Weightings of TorchJD as rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pinet_fast.aggregation.rules.function import FunctionRule
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# Those that map a Gram to weights and keep no state between calls.
ALLOWED = (
    "AlignedMTLWeighting", "CAGradWeighting", "DualProjWeighting", "FairGradWeighting",
    "IMTLGWeighting", "KrumWeighting", "MGDAWeighting", "MeanWeighting", "PCGradWeighting",
    "RandomWeighting", "SumWeighting", "UPGradWeighting",
)  # fmt: skip
_STATEFUL = ("CRMOGMWeighting", "GradVacWeighting", "PCDWeighting")


class TorchJDRule(FunctionRule):
    """A weighting of TorchJD; made by :func:`from_torchjd`."""

    def __repr__(self) -> str:
        return f"TorchJDRule({self._name})"


def is_torchjd(rule: object) -> bool:
    """Return whether an object is of a class that TorchJD defines."""
    return type(rule).__module__.split(".")[0] == "torchjd"


def from_torchjd(weighting: Callable[[Tensor], Tensor], per_parameter: bool = False) -> TorchJDRule:
    """Wrap a Gramian weighting of TorchJD, ``UPGradWeighting()`` for example.

    Weights are as TorchJD scales them: PCGrad and UPGrad sum over strata where ours take the mean,
    CAGrad is longer by ``1 + c``. Most wait for the device on CUDA, some solve on the CPU.

    Args:
        weighting: An object of one of the classes in the allow-list, which the error names.
        per_parameter: Weigh the strata of every parameter apart.

    Raises:
        ConfigError: Another class: one that needs the gradients themselves, that keeps state
            which a skipped step or a checkpoint would lose, or an aggregator.
    """
    name = type(weighting).__name__
    if is_torchjd(weighting) and name in ALLOWED:
        return TorchJDRule(weighting, per_parameter)
    why = ""
    if name in _STATEFUL:
        why = "; it changes its state at every call, which a skipped step cannot take back"
    elif f"{name}Weighting" in ALLOWED:
        why = f"; it aggregates a Jacobian, pass {name}Weighting(...)"
    raise ConfigError(
        f"from_torchjd: expected a TorchJD weighting among {', '.join(ALLOWED)}; got {name}{why}"
    )
