"""Stratum gradients seen from outside: by priors that count one stratum only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.rules import Backdoor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def stratum_gradients(
    parameters: Sequence[Tensor],
    num_strata: int,
    run: Callable[[GradientAggregator], None],
    **options: Any,
) -> list[Tensor]:
    """Return [S, *shape] a parameter: ``p.grad`` of ``run`` with each stratum counted alone.

    Args:
        parameters: The parameters; dense gradients are returned for sparse ones too.
        num_strata: S.
        run: Runs one stratified forward and backward of the same batch.
        options: Further arguments of the aggregator.
    """
    found = [p.new_zeros((num_strata, *p.shape)) for p in parameters]
    for s in range(num_strata):
        prior = [float(s == t) for t in range(num_strata)]
        opt = GradientAggregator(
            torch.optim.SGD(list(parameters), lr=0.1), Backdoor(prior), num_strata=num_strata,
            report_every=1, **options,
        )  # fmt: skip
        opt.zero_grad()
        run(opt)
        assert opt.report.mode == "one-pass"
        for gradient, p in zip(found, parameters, strict=True):
            if p.grad is not None:
                gradient[s] = p.grad.to_dense() if p.grad.is_sparse else p.grad
    return found
