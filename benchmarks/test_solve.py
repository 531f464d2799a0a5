"""Microseconds of every rule in ``stratum_solve``, relative to its plain PyTorch definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pinet_fast.kernels import stratum_solve
from pinet_fast.kernels.stratum_solve import RULES

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("num_strata", [4, 8])
@pytest.mark.parametrize("rule", RULES)
def test_solve_over_reference(
    rule: str, num_strata: int, paired: Callable[..., Any], benchmark: Any, capsys: Any
) -> None:
    """Agreement decides for 30 parameters at once; the others for the whole model."""
    benchmark.group = f"solve, S = {num_strata}"
    torch.manual_seed(0)
    gradients = torch.randn(num_strata, 20, dtype=torch.float64)
    if rule == "agreement":
        gradients = torch.randn(30, num_strata, 20, dtype=torch.float64)
    gram = gradients @ gradients.mT
    torch.testing.assert_close(
        stratum_solve(gram, rule), stratum_solve(gram, rule, backend="reference"),
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    result = paired(
        lambda: stratum_solve(gram, rule), lambda: stratum_solve(gram, rule, backend="reference")
    )
    benchmark.extra_info["microseconds"] = result.candidate_ms * 1e3
    if not benchmark.disabled:
        with capsys.disabled():
            print(f"    {result.candidate_ms * 1e3:.0f} us")
