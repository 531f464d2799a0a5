"""Ops of pinet_fast, imported as ``pinet_fast.kernels``.

Importing this loads no Triton, no compiled library and no driver; the first call of an op does.
"""

from ._registry import backend_status, describe_status
from .stratum_combine import stratum_combine
from .stratum_gram import stratum_gram
from .stratum_solve import stratum_solve

__all__ = [
    "backend_status",
    "describe_status",
    "stratum_combine",
    "stratum_gram",
    "stratum_solve",
]
