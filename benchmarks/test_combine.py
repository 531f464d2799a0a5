"""The weighted sum of stratum gradients, relative to copying them once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pinet_fast.kernels import stratum_combine
from pinet_fast.kernels.stratum_combine import cost

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("num_strata", [2, 4, 8])
def test_combine_over_copy(
    num_strata: int, accumulate: bool, paired: Callable[..., Any], benchmark: Any, capsys: Any
) -> None:
    """10 M parameters; a copy moves 2 S n numbers, the op (S + 1) n, or one more if it adds."""
    benchmark.group = "combine"
    torch.manual_seed(0)
    sizes = [10_000_000 // 8] * 8
    grads = [torch.randn(num_strata, size) for size in sizes]
    outs = [torch.zeros(size) for size in sizes]
    targets = [torch.empty_like(g) for g in grads]
    weights = torch.rand(num_strata, dtype=torch.float64)
    stratum_combine(grads, weights, outs)
    expected = (weights.float()[:, None] * grads[0]).sum(0)
    torch.testing.assert_close(outs[0], expected, rtol=1e-5, atol=1e-5)

    def copy() -> None:
        for target, grad in zip(targets, grads, strict=True):
            target.copy_(grad)

    def combine() -> None:
        stratum_combine(grads, weights, outs, accumulate=accumulate)

    result = paired(combine, copy, rounds=20)
    moved = cost([g.shape for g in grads], 4, accumulate)[1] / (2 * num_strata * sum(sizes) * 4)
    benchmark.extra_info["share_of_copy_bandwidth"] = moved / result.ratio
    if not benchmark.disabled:
        with capsys.disabled():
            print(f"    {moved / result.ratio:.2f} of copy bandwidth")


def test_combine_of_a_small_model_over_a_loop(paired: Callable[..., Any], benchmark: Any) -> None:
    """Thirty parameters of a small encoder: one call against one matrix product a parameter."""
    benchmark.group = "combine"
    torch.manual_seed(0)
    shapes = [(3417, 64), (50, 64), *[(64, 64)] * 12, *[(64,)] * 16]
    grads = [torch.randn(4, *shape) for shape in shapes]
    outs = [torch.empty(shape) for shape in shapes]
    weights = torch.rand(4, dtype=torch.float64)

    def loop() -> None:
        for grad, out in zip(grads, outs, strict=True):
            flat = grad.reshape(4, -1)
            out.copy_(torch.mv(flat.t(), weights.to(flat.dtype)).view(out.shape))

    paired(lambda: stratum_combine(grads, weights, outs), loop)
