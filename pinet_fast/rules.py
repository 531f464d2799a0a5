"""Rules: how stratum gradients become one gradient (``pinet_fast.aggregation.rules``)."""

from pinet_fast.aggregation.rules import *  # noqa: F403 - the same names, under a shorter one
from pinet_fast.aggregation.rules import __all__ as __all__
