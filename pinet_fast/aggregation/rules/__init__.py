"""Rules: how stratum gradients become one gradient."""

from __future__ import annotations

from pinet_fast.aggregation.rules.agreement import Agreement
from pinet_fast.aggregation.rules.backdoor import Backdoor
from pinet_fast.aggregation.rules.base import BatchStrata, ConstantRule, GramRule, Rule
from pinet_fast.aggregation.rules.joint import Joint
from pinet_fast.errors import ConfigError

__all__ = [
    "Agreement",
    "Backdoor",
    "BatchStrata",
    "ConstantRule",
    "GramRule",
    "Joint",
    "Rule",
    "by_name",
    "names",
]

_RULES: dict[str, type[ConstantRule | GramRule]] = {
    "joint": Joint,
    "backdoor": Backdoor,
    "agreement": Agreement,
}


def names() -> tuple[str, ...]:
    """Return the names that :func:`by_name` knows."""
    return tuple(_RULES)


def by_name(rule: str | Rule) -> Rule:
    """Return a rule by its name with its defaults, or ``rule`` itself.

    Raises:
        ConfigError: An unknown name, or something that is no rule.
    """
    if isinstance(rule, str):
        if rule not in _RULES:
            raise ConfigError(f"rule: expected one of {', '.join(_RULES)}; got {rule!r}")
        return _RULES[rule]()
    if not isinstance(rule, ConstantRule | GramRule):
        raise ConfigError(
            f"rule: expected a name ({', '.join(_RULES)}) or a Rule object, got "
            f"{type(rule).__name__}"
        )
    return rule
