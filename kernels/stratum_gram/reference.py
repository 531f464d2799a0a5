"""The contract of ``stratum_gram`` in plain PyTorch: any device, any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_RUN = 64
"""Products that are summed in their own dtype on a CPU; all above is summed in float64."""

_ALIGNMENT = 64
"""Bytes; that of every tensor of torch's own."""

_MAX_PRODUCTS = 1 << 24
"""Products that are held at once elsewhere."""


def stratum_gram_reference(grads: Sequence[Tensor], out: Tensor) -> None:
    """Write ``out[p, s, t] = <grads[p][s], grads[p][t]>``.

    Args:
        grads: P tensors [S, ...] of any floating dtype and strides.
        out: [P, S, S] float64, fully written.
    """
    if out.device.type == "cpu":
        _by_runs(grads, out)
    else:
        by_products(grads, out)
    out.copy_(out.triu() + out.triu(1).mT)


def _by_runs(grads: Sequence[Tensor], out: Tensor) -> None:
    """Write the inner products on a CPU: matrix products of runs, which are then added."""
    strata = out.shape[1]
    products: list[Tensor] = []  # [runs, S, S]
    firsts, runs = [], 0
    for grad in grads:
        firsts.append(runs)
        columns = grad.numel() // strata
        if columns == 0:
            continue
        rows = grad.reshape(strata, columns).contiguous()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if columns % _RUN or rows.data_ptr() % _ALIGNMENT:
            # The last bits of a matrix product depend on where its operands lie.
            rows = torch.nn.functional.pad(rows, (0, -columns % _RUN))
        blocks = rows.view(strata, -1, _RUN).transpose(0, 1)
        products.append(torch.bmm(blocks, blocks.mT).double())
        runs += blocks.shape[0]
    if runs == 0:
        out.zero_()
        return
    # A bag is added by one thread; torch would split a sum among them, which changes the last bits.
    sums = torch.embedding_bag(
        torch.cat(products).flatten(1), torch.arange(runs), torch.tensor(firsts)
    )
    out.copy_(sums[0].view_as(out))


def by_products(grads: Sequence[Tensor], out: Tensor) -> None:
    """Write the inner products on any device, every product and sum in float64.

    Args:
        grads: P tensors [S, ...] of any floating dtype and strides.
        out: [P, S, S] float64, fully written.
    """
    strata = out.shape[1]
    width = max(_MAX_PRODUCTS // strata**2, 1)
    out.zero_()
    for grad, gram in zip(grads, out, strict=True):
        slices = grad.reshape(strata, grad.numel() // strata)
        for start in range(0, slices.shape[1], width):
            rows = slices[:, start : start + width].double()
            gram += (rows[:, None] * rows).sum(2)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grads: None,
    impl=stratum_gram_reference,
)
