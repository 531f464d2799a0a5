"""Rules: how stratum gradients become one gradient (``pinet_fast.aggregation.rules``)."""

from pinet_fast.aggregation.rules import (
    Agreement,
    Backdoor,
    BatchStrata,
    ConstantRule,
    GramRule,
    Joint,
    Rule,
    by_name,
    names,
)

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
