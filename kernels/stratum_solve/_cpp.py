"""C++ backend of ``stratum_solve``; the specification is in ``csrc/stratum_solve.h``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .._library import cpp_probe
from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_MAX_STRATA = 64
# As numbered in csrc/stratum_solve.h.
_NUMBER = {
    "agreement": 0,
    "balanced": 1,
    "mgda": 2,
    "pcgrad": 3,
    "imtlg": 4,
    "alignedmtl": 5,
    "cagrad": 6,
}


def is_supported(gram: Tensor, rule: str) -> str | None:
    """Return None if the C++ kernel takes this Gram, else the reason why not."""
    if gram.device.type != "cpu":
        return f"the Gram is on {gram.device.type}, not cpu"
    if gram.shape[-1] > _MAX_STRATA:
        return f"{gram.shape[-1]} strata are more than {_MAX_STRATA}"
    return None


def run(
    gram: Tensor, rule: str, kept: Sequence[int], c: float, keys: Tensor | None, out: Tensor
) -> None:
    """Write the weights of every Gram into ``out`` [P, S] float64."""
    keys = None if keys is None else keys.contiguous()
    torch.ops.pinet_cpp.stratum_solve.default(gram.contiguous(), _NUMBER[rule], kept, c, keys, out)


BACKEND = Backend(
    name="cpp",
    priority=30,
    probe=functools.partial(cpp_probe, "stratum_solve"),
    is_supported=is_supported,
    impl=run,
)
