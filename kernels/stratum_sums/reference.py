"""The contract of ``stratum_sums`` in plain PyTorch: any device, any dtype, float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._registry import Backend

if TYPE_CHECKING:
    from torch import Tensor

# torch splits a sum of 32768 numbers or more among threads, which changes the last bits.
_MAX_ELEMENTS_ON_CPU = 32767
_MAX_ELEMENTS = 1 << 24


def stratum_sums_reference(rows: Tensor, ids: Tensor, out: Tensor) -> None:
    """Write ``out[s] = sum of the rows of stratum s``; reads no value on the host.

    Args:
        rows: [N, D] of any floating dtype and strides.
        ids: int64 [N] in ``0..S-1``.
        out: [S, D] of any floating dtype, fully written.
    """
    elements = _MAX_ELEMENTS_ON_CPU if rows.device.type == "cpu" else _MAX_ELEMENTS
    height = max(elements // max(rows.shape[1], 1), 1)
    for s in range(out.shape[0]):
        total = torch.zeros(out.shape[1:], dtype=torch.float64, device=out.device)
        for start in range(0, rows.shape[0], height):
            part, where = rows[start : start + height], ids[start : start + height]
            # Not a product with a mask or a matrix: 0 * NaN would spread to other strata.
            total += torch.where((where == s).unsqueeze(1), part.double(), 0.0).sum(0)
        out[s].copy_(total)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda rows, ids, num_strata: None,
    impl=stratum_sums_reference,
)
