"""Rules: how stratum gradients become one gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pinet_fast.aggregation.rules.agreement import Agreement
from pinet_fast.aggregation.rules.aligned_mtl import AlignedMTL
from pinet_fast.aggregation.rules.backdoor import Backdoor
from pinet_fast.aggregation.rules.balanced import Balanced
from pinet_fast.aggregation.rules.base import (
    BatchStrata,
    Claim,
    ConstantRule,
    ElementwiseRule,
    GramRule,
    Rule,
)
from pinet_fast.aggregation.rules.cagrad import CAGrad
from pinet_fast.aggregation.rules.ema import EMA
from pinet_fast.aggregation.rules.function import FunctionRule
from pinet_fast.aggregation.rules.imtlg import IMTLG
from pinet_fast.aggregation.rules.joint import Joint
from pinet_fast.aggregation.rules.mgda import MGDA
from pinet_fast.aggregation.rules.pcgrad import PCGrad
from pinet_fast.aggregation.rules.sign_agreement import SignAgreement
from pinet_fast.aggregation.rules.torchjd_adapter import from_torchjd, is_torchjd
from pinet_fast.aggregation.rules.trimmed_mean import TrimmedMean
from pinet_fast.aggregation.rules.warmup import Warmup
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "EMA",
    "IMTLG",
    "MGDA",
    "Agreement",
    "AlignedMTL",
    "Backdoor",
    "Balanced",
    "BatchStrata",
    "CAGrad",
    "Claim",
    "ConstantRule",
    "ElementwiseRule",
    "FunctionRule",
    "GramRule",
    "Joint",
    "PCGrad",
    "Rule",
    "SignAgreement",
    "TrimmedMean",
    "Warmup",
    "by_name",
    "from_torchjd",
    "names",
]

_RULES: dict[str, Callable[[], Rule]] = {
    "joint": Joint,
    "backdoor": Backdoor,
    "agreement": Agreement,
    "balanced": Balanced,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "imtlg": IMTLG,
    "alignedmtl": AlignedMTL,
    "cagrad": CAGrad,
    "signagreement": SignAgreement,
    "trimmedmean": TrimmedMean,
}


def names() -> tuple[str, ...]:
    """Return the names that :func:`by_name` knows."""
    return tuple(_RULES)


def by_name(rule: str | Rule | Callable[[Tensor], Tensor]) -> Rule:
    """Return a rule by its name with its defaults, a function as a rule, or ``rule`` itself.

    Args:
        rule: One of :func:`names`, a Rule, a weighting of TorchJD, or any function from the Gram
            [K, K] of the strata that are present to their weights [K].

    Raises:
        ConfigError: An unknown name, or something that is no rule.
    """
    if isinstance(rule, str):
        if rule not in _RULES:
            raise ConfigError(f"rule: expected one of {', '.join(_RULES)}; got {rule!r}")
        return _RULES[rule]()
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, type):
        raise ConfigError(
            f"rule: expected an object, got the class {rule.__name__}; write {rule.__name__}(...)"
        )
    if not callable(rule):
        raise ConfigError(
            f"rule: expected a name ({', '.join(_RULES)}), a Rule object or a function [K, K] -> "
            f"[K]; got {type(rule).__name__}"
        )
    return from_torchjd(rule) if is_torchjd(rule) else FunctionRule(rule)
