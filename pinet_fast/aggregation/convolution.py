"""Boundary op of convolutions over time, with stratum gradients of the kernel and bias.

The forward and the gradient of the rows are one call for the whole batch. The gradient of the
kernel is one call for each stratum that is present, on the rows of the stratum: torch has none that
keeps groups of rows apart, and rows unfolded to one linear layer would hold each value as often as
the kernel is long. The slice rule runs all three of these a stratum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pinet_fast.aggregation.first_order import first_order
from pinet_fast.kernels import stratum_sums

if TYPE_CHECKING:
    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.strata_index import RowGroups

# torch.autograd.Function is untyped: its contexts are Any throughout this file.


class Window(NamedTuple):
    """How a kernel moves over the rows.

    Attributes:
        stride: Steps between two positions of the kernel.
        padding: Zeros added at both ends.
        dilation: Steps between two entries of the kernel.
        groups: Blocks of channels that do not meet.
    """

    stride: int
    padding: int
    dilation: int
    groups: int


class StratifiedConv1d(torch.autograd.Function):
    """Convolution of [N, C_in, L] with a kernel [C_out, C_in / groups, K]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        window: Window,
        groups: RowGroups,
        layout: RowLayout,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, weight)  # one more than the op replaced
        ctx.window = window
        ctx.groups = groups
        ctx.layout = layout  # read by provenance.trace
        return torch.conv1d(rows, weight, bias, *window)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, _ = ctx.saved_tensors
        needs, groups, window = ctx.needs_input_grad, ctx.groups, ctx.window
        for_rows, for_weight, for_bias = _gradients(
            grad, rows, weight, window, [needs[0], needs[1], needs[2]]
        )
        weight_strata = bias_strata = None
        if needs[3]:
            weight_strata = weight.new_zeros(groups.num_strata, *weight.shape)
            parts = zip(groups.split(grad), groups.split(rows), strict=True)
            for stratum, (of_grad, of_rows) in enumerate(parts):
                if len(of_rows):
                    only = [False, True, False]
                    part = _gradients(of_grad, of_rows, weight, window, only)[1]
                    weight_strata[stratum] = part
        if needs[4]:
            bias_strata = stratum_sums(grad.sum(2), groups.ids, groups.num_strata)
        return for_rows, for_weight, for_bias, weight_strata, bias_strata, None, None, None


def _gradients(
    grad: Tensor, rows: Tensor, weight: Tensor, window: Window, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows, kernel and bias that are needed."""
    if not any(needs):
        return None, None, None
    stride, padding, dilation, groups = window
    found: tuple[Tensor | None, Tensor | None, Tensor | None]
    found = torch.ops.aten.convolution_backward(
        grad, rows, weight, [weight.shape[0]], [stride], [padding], [dilation], False, [0], groups,
        needs,
    )  # fmt: skip
    return found
