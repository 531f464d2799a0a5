"""Layouts that are remembered while a graph is walked are right wherever a walk ends at them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pinet_fast.aggregation.boundary import StratifiedLinear
from pinet_fast.aggregation.layout import RowLayout
from pinet_fast.aggregation.provenance import Traced, trace
from pinet_fast.aggregation.strata_index import RowGroups

GROUPS = RowGroups.from_ids(torch.tensor([0, 1, 1, 2, 0]), 3)
B, L, D = 5, 4, 5  # features as wide as the batch: sizes alone would not tell
LAYOUT = RowLayout(0, "users", GROUPS)


def boundary(rows: Tensor) -> Tensor:
    weight = torch.randn(D, D)
    leaf = weight.expand(3, D, D).requires_grad_()
    groups = GROUPS.repeated(rows[0].numel() // D)
    return StratifiedLinear.apply(rows, weight, None, leaf, None, groups, LAYOUT)  # type: ignore[no-any-return, no-untyped-call]


# Of a tensor and another that may be added to it; the same views are applied to the users' numbers.
MOVES = {
    "there and back": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "time-major": lambda x: x.transpose(0, 1) if x.dim() == 3 and x.shape[0] == B else x,
    "flat": lambda x: x.reshape(-1, D) if x.dim() == 3 and x.shape[0] == B else x,
    "stacked": lambda x: torch.cat([x, x], -1)[..., :D],
}
SUMS = {
    "residual": lambda x, start: x + (start if x.shape == start.shape else x).tanh(),
    "scaled": lambda x, start: x * 2.0,
    "boundary": lambda x, start: boundary(x) if x.dim() == 3 and x.shape[0] == B else x,
}


def is_right(layout: RowLayout, users: Tensor) -> bool:
    """Return whether a layout names the stratum of every position; ``users`` are their numbers."""
    along = users.movedim(layout.dim, 0).flatten(1)
    ids = layout.groups.ids.repeat_interleave(layout.inner).repeat(layout.outer)
    return bool((along == along[:, :1]).all()) and torch.equal(GROUPS.ids[along[:, 0]], ids)


@given(st.lists(st.sampled_from([*MOVES, *SUMS]), max_size=8))
def test_what_is_remembered_is_right_and_no_less(names: list[str]) -> None:
    known: Traced = {}
    x = start = boundary(torch.randn(B, L, D))
    users = torch.arange(B).view(B, 1, 1).expand(B, L, D)
    for name in names:
        if name in MOVES:
            x, users = MOVES[name](x), MOVES[name](users)
        else:
            x = SUMS[name](x, start)
        anew, remembered = trace(x), trace(x, known)
        for layout in (anew, remembered):
            assert layout is None or is_right(layout, users)
        assert anew is None or remembered == anew
    assert trace(start, known) == LAYOUT


class Foreign(torch.autograd.Function):
    """A function of somebody else, which notes a layout of another kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.layout = "NC"
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_layouts_of_others_are_none() -> None:
    x = Foreign.apply(boundary(torch.randn(B, L, D)))  # type: ignore[no-untyped-call]
    assert trace(x) is None
    assert trace(boundary(x) + x) == LAYOUT
