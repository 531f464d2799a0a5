"""Every way to write a sum, difference or product of rows and a parameter is exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.boundaries import assert_exact, leaf, per_row
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator

if TYPE_CHECKING:
    from collections.abc import Callable

S = 4

# Factors alpha are powers of two: torch rounds a sum with any other once, and the boundary twice.
FORMS: dict[str, Callable[[Any, Any], Tensor]] = {
    "+": lambda a, b: a + b,
    "torch.add": torch.add,
    "add alpha": lambda a, b: torch.add(a, b, alpha=4),
    "Tensor.add alpha": lambda a, b: a.add(b, alpha=-0.5),
    "other=": lambda a, b: torch.add(a, other=b),
    "-": lambda a, b: a - b,
    "torch.sub": torch.sub,
    "sub alpha": lambda a, b: torch.sub(a, b, alpha=2),
    "subtract": lambda a, b: a.subtract(b),
    "__rsub__": lambda a, b: a.__rsub__(b),
    "__radd__": lambda a, b: a.__radd__(b),
    "*": lambda a, b: a * b,
    "torch.mul": torch.mul,
    "multiply": lambda a, b: a.multiply(b),
    "__rmul__": lambda a, b: a.__rmul__(b),
}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_form(data: st.DataObject) -> None:
    users, length, width = data.draw(st.sampled_from([4, 6, 7])), 11, 3
    ids = torch.tensor(data.draw(st.lists(st.integers(0, S - 1), min_size=users, max_size=users)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = leaf(users, length, data.draw(st.sampled_from([width, 1])))
    p = leaf(
        *data.draw(
            st.sampled_from([(width,), (1,), (1, width), (length, 1), (length, width), (1, 1, 1)])
        )
    )
    form, turned = data.draw(st.sampled_from(list(FORMS))), data.draw(st.booleans())
    combine = FORMS[form]

    def losses() -> Tensor:
        return per_row(combine(p, x) if turned else combine(x, p), 0, "dense")

    found = assert_exact(losses, [p], ids, S, below=[x])
    assert {entry.rule for entry in found} == {"boundary"}


@pytest.mark.parametrize("shape", [(0,), (1, 0), (4, 0)])
@pytest.mark.parametrize("form", ["+", "*"])
def test_nothing_wide(form: str, shape: tuple[int, ...]) -> None:
    x, p = leaf(6, 4, 0), leaf(*shape)
    opt = GradientAggregator(torch.optim.SGD([p], lr=0.1), "agreement")
    with opt.stratify(torch.arange(6) % S):
        losses = FORMS[form](x, p).sum((1, 2))
    opt.backward(losses)
    assert p.grad is not None
    assert p.grad.shape == shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_frozen_parameter_holds_no_rows(form: str, turned: bool) -> None:
    """Not though it is as long as the batch: what it makes of a parameter is a parameter still."""
    users = 6
    scale, frozen = leaf(3), nn.Parameter(torch.randn(users, 3).double(), False)
    x = torch.randn(users, 3, dtype=torch.float64)
    combine = FORMS[form]

    def losses() -> Tensor:
        both = combine(scale, frozen) if turned else combine(frozen, scale)
        return (x @ both.T).square().sum(1)

    assert_exact(losses, [scale], torch.arange(users) % S, S)
