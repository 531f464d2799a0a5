"""A boundary against plain autograd: stratum gradients, the gradients below it, and the forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast.aggregation import GradientAggregator, StrataIndex
from pinet_fast.aggregation.losses import stratum_losses
from support.oracle import autograd_stratum_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pinet_fast.aggregation.coverage import Coverage


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random numbers with a gradient: a parameter, or rows below which a model goes on."""
    return torch.randn(shape, dtype=dtype).requires_grad_()


def per_row(out: Tensor, dim: int = 0, grad: str = "dense") -> Tensor:
    """Return one loss a row of ``out``, with a gradient laid out as ``grad`` says."""
    flat = out.movedim(dim, 0)
    if grad == "expanded":  # stride 0: every entry has the same gradient
        return flat.flatten(1).sum(1)
    if grad == "strided":  # gradients of the last dimension first in memory
        flat = flat.movedim(-1, 1).contiguous()
    return flat.sin().flatten(1).sum(1)


def assert_exact(
    losses: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    ids: Tensor,
    num_strata: int,
    *,
    below: Sequence[Tensor] = (),
    lengths: Tensor | None = None,
    rows: Any = None,
    tolerance: float = 1e-10,
) -> Coverage:
    """Compare one stratified pass with one autograd pass for each stratum.

    Args:
        losses: The forward: one loss a user, or an event.
        parameters: The optimizer's.
        ids: Stratum of every user.
        num_strata: S.
        below: Tensors that are not the optimizer's and get their ordinary gradient.
        lengths: Events of every user, where the losses are one an event.
        rows: Declared layouts.
        tolerance: Relative to the largest entry of each gradient.
    """
    row_ids = ids if lengths is None else ids.repeat_interleave(lengths)
    plain = losses()
    # In one pass: group_norm of torch 2.13 crashes where rows, channels last, need no gradient.
    everything = autograd_stratum_gradients(losses, row_ids, [*parameters, *below], num_strata)
    expected = everything[: len(parameters)]
    # What is below gets the gradient of the sum of all stratum means.
    wanted = [strata.sum(0) for strata in everything[len(parameters) :]]
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    opt = GradientAggregator(torch.optim.SGD(named, lr=0.1), "agreement", num_strata=num_strata)
    with opt.stratify(StrataIndex(ids, num_strata, lengths), rows=rows):
        values = losses()
    assert torch.equal(values, plain)
    session = opt._session
    assert session is not None
    reduced = stratum_losses(values, None, session.rows)
    found = session.stratum_gradients(reduced, step=0).strata
    for i, (strata, p, theirs) in enumerate(zip(found, parameters, expected, strict=True)):
        mine = torch.zeros_like(theirs) if strata is None else strata.dense(p)
        assert mine.dtype == p.dtype
        _close(mine, theirs, tolerance, f"parameter {i}")
    for i, (tensor, theirs) in enumerate(zip(below, wanted, strict=True)):
        assert tensor.grad is not None
        _close(tensor.grad, theirs, tolerance, f"tensor {i} below")
        tensor.grad = None
    return opt.coverage()


def assert_ruled(coverage: Coverage, op: str, num_uses: int = 1) -> None:
    """All uses are of one op, and none is sliced."""
    assert {(e.op, e.rule) for e in coverage} == {(op, "boundary")}
    assert max(e.use for e in coverage) == num_uses


def _close(mine: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    error = float((mine - theirs).abs().max())
    assert error <= tolerance * max(float(theirs.abs().max()), 1e-3), f"{what} is off by {error}"
