"""The contract of ``stratum_gram`` in plain PyTorch: any device, any dtype, float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# torch splits a sum of 32768 numbers or more among threads, which changes the last bits.
_MAX_PRODUCTS_ON_CPU = 32767
_MAX_PRODUCTS = 1 << 24


def stratum_gram_reference(grads: Sequence[Tensor], out: Tensor) -> None:
    """Write ``out[p, s, t] = <grads[p][s], grads[p][t]>``.

    Args:
        grads: P tensors [S, ...] of any floating dtype and strides.
        out: [P, S, S] float64, fully written.
    """
    strata = out.shape[1]
    products = _MAX_PRODUCTS_ON_CPU if out.device.type == "cpu" else _MAX_PRODUCTS
    width = max(products // strata**2, 1)
    out.zero_()
    for grad, gram in zip(grads, out, strict=True):
        slices = grad.reshape(strata, grad.numel() // strata)
        for start in range(0, slices.shape[1], width):
            rows = slices[:, start : start + width].double()
            # Not a matrix product, which may mix strata by multiplying a NaN with zero.
            gram += (rows[:, None] * rows).sum(2)
        gram.copy_(gram.triu() + gram.triu(1).mT)


BACKEND = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda grads: None,
    impl=stratum_gram_reference,
)
