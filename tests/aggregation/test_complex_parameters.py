"""Complex views of real parameters, as in filters of frequencies, are exact.

Filter-enhanced MLPs (arXiv 2202.13556) multiply the spectrum of a window by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.boundaries import assert_exact, leaf, per_row
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

B, L, D, S = 7, 6, 3, 4
BINS = L // 2 + 1
IDS = torch.tensor([2, 0, 1, 1, 0, 3, 2])

# Of the spectrum [B, BINS, D] and the parameter, and the other way round.
EITHER_WAY: dict[str, Callable[[Any, Any], Tensor]] = {
    "*": lambda a, b: a * b,
    "torch.mul": torch.mul,
    "/": lambda a, b: a / b,
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "add alpha": lambda a, b: torch.add(a, b, alpha=2),
}

# Of the spectrum and a parameter of this shape: the rule, and the function.
PRODUCTS: dict[str, tuple[tuple[int, ...], str, Callable[[Any, Any], Tensor]]] = {
    "real rows": ((BINS, D), "boundary", lambda x, p: x.real * p),
    "real rows, real result": ((BINS, D), "boundary", lambda x, p: (x.abs() / p).abs()),
    "a number": ((1,), "boundary", lambda x, p: x * p),
    "in place": ((BINS, D), "boundary", lambda x, p: x.clone().mul_(p)),
    "linear": ((D, D), "slice", F.linear),
    "matmul": ((D, D), "slice", lambda x, p: x @ p),
    "einsum": ((D, D), "slice", lambda x, p: torch.einsum("bfd,de->bfe", x, p)),
    "einsum, batched": ((BINS, D, D), "boundary", lambda x, p: torch.einsum("bfd,fde->bfe", x, p)),
    "bmm": ((BINS, D, D), "boundary", lambda x, p: torch.bmm(x.transpose(0, 1), p).transpose(0, 1)),
    "einsum, complex by name": (
        (BINS, D),
        "boundary",
        lambda x, p: torch.einsum("bfd,fd->bfd", x, p),
    ),
    "einsum of real rows": (
        (BINS, D),
        "slice",
        lambda x, p: torch.einsum("bfd,fd->bfd", x.real, p),
    ),
    "outer product": ((2,), "slice", lambda x, p: torch.einsum("bfd,e->bfde", x, p).sum(3)),
    "conv1d": ((D, D, 1), "slice", lambda x, p: F.conv1d(x.mT, p).mT),
}


def losses(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, p: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x, dim=1)
    return per_row(torch.fft.irfft(combine(spectrum, torch.view_as_complex(p)), n=L, dim=1))


@pytest.mark.parametrize("form", EITHER_WAY)
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("width", [D, 1])
def test_filters(form: str, is_first: bool, width: int) -> None:
    torch.manual_seed(0)
    x, p = leaf(B, L, D), leaf(BINS, width, 2)
    combine = EITHER_WAY[form]
    turned = (lambda a, b: combine(b, a)) if is_first else combine
    found = assert_exact(lambda: losses(turned, x, p), [p], IDS, S, below=[x])
    assert {entry.rule for entry in found} == {"boundary"}


@pytest.mark.parametrize("what", PRODUCTS)
def test_products(what: str) -> None:
    torch.manual_seed(0)
    shape, rule, combine = PRODUCTS[what]
    x, p = leaf(B, L, D), leaf(*shape, 2)
    found = assert_exact(lambda: losses(combine, x, p), [p], IDS, S, below=[x])
    assert {entry.rule for entry in found} == {rule}
