"""The S x S Gram of stratum gradients, relative to copying them once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pinet_fast.kernels import stratum_gram

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("num_strata", [2, 4, 8])
def test_gram_over_copy(num_strata: int, paired: Callable[..., Any], benchmark: Any) -> None:
    benchmark.group = "gram"
    torch.manual_seed(0)
    sizes = [10_000_000 // num_strata // 8] * 8
    grads = [torch.randn(num_strata, size) for size in sizes]
    targets = [torch.empty_like(g) for g in grads]
    expected = torch.stack([g.double() @ g.double().T for g in grads])
    torch.testing.assert_close(stratum_gram(grads), expected, rtol=1e-5, atol=1e-2)

    def copy() -> None:
        for target, grad in zip(targets, grads, strict=True):
            target.copy_(grad)

    paired(lambda: stratum_gram(grads), copy)
