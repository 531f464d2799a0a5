"""The contract of plugin heads, to be tried on any kind: import ``CHECKS``, call each with yours.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_heads(check): check(MyHeads)

A check takes what makes heads from (num_strata, dim) and raises AssertionError where they differ.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pinet_fast.aggregation import RowGroups
from pinet_fast.errors import StrataError

if TYPE_CHECKING:
    from collections.abc import Callable

S, DIM = 4, 6
IDS = torch.tensor([2, 0, 0, 3, 2])
ORDERS = {
    "any order": IDS,
    "sorted": IDS.sort().values,
    "none": IDS[:0],
    "one row": torch.tensor([3]),
    "one stratum": torch.tensor([1, 1, 1]),
}


def trained(kind: Callable[[int, int], Any], seed: int = 0) -> Any:
    """Return heads with random parameters, float64."""
    torch.manual_seed(seed)
    heads = kind(S, DIM).double()
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn_like(p))
    return heads


def untrained_heads_are_the_identity(kind: Callable[[int, int], Any]) -> None:
    for ids in ORDERS.values():
        rows = torch.randn(len(ids), DIM)
        assert torch.equal(kind(S, DIM)(rows, RowGroups.from_ids(ids, S)), rows)


def untrained_heads_can_be_trained(kind: Callable[[int, int], Any]) -> None:
    """Identity is a start, not a dead end: some parameter of every present stratum has gradient."""
    heads = kind(S, DIM)
    heads(torch.randn(5, DIM), RowGroups.from_ids(IDS, S)).pow(2).sum().backward()
    for s in (0, 2, 3):
        assert any(p.grad is not None and (p.grad[s] != 0).any() for p in heads.parameters())


def every_parameter_has_the_strata_first(kind: Callable[[int, int], Any]) -> None:
    """What the recipe relies on to keep each stratum's head at its own best epoch."""
    state = kind(S, DIM).state_dict()
    assert state
    assert all(value.shape[0] == S for value in state.values())
    assert kind(S, DIM).num_strata == S


def rows_go_through_the_head_of_their_stratum_alone(kind: Callable[[int, int], Any]) -> None:
    heads = trained(kind)
    for ids in ORDERS.values():
        rows = torch.randn(len(ids), DIM, dtype=torch.float64)
        together = heads(rows, RowGroups.from_ids(ids, S))
        assert together.shape == rows.shape
        for i, s in enumerate(ids.tolist()):
            one = RowGroups.from_ids(torch.tensor([s]), S)
            torch.testing.assert_close(heads(rows[i : i + 1], one)[0], together[i])
            other = copy.deepcopy(heads)
            with torch.no_grad():
                for p in other.parameters():
                    p[[t for t in range(S) if t != s]] = torch.nan
            assert torch.equal(other(rows[i : i + 1], one)[0].isnan(), torch.zeros(DIM).bool())


def gradients_stay_inside_the_stratum(kind: Callable[[int, int], Any]) -> None:
    heads = trained(kind)
    rows = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    out = heads(rows, RowGroups.from_ids(IDS, S))
    out[IDS == 2].pow(2).sum().backward()
    others = [0, 1, 3]
    for p in heads.parameters():
        assert p.grad is not None
        assert torch.equal(p.grad[others], torch.zeros_like(p.grad[others]))
        assert (p.grad[2] != 0).any()
    assert rows.grad is not None
    assert torch.equal((rows.grad != 0).any(1), IDS == 2)


def gradients_are_right(kind: Callable[[int, int], Any]) -> None:
    heads = trained(kind)
    rows = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    groups = RowGroups.from_ids(IDS, S)
    assert torch.autograd.gradcheck(lambda x: heads(x, groups), (rows,))
    names, values = zip(*heads.named_parameters(), strict=True)

    def by_parameters(*parameters: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(heads, state, (rows.detach(), groups))

    assert torch.autograd.gradcheck(by_parameters, values)


def layouts_and_dtypes_do_not_matter(kind: Callable[[int, int], Any]) -> None:
    heads = trained(kind)
    rows = torch.randn(DIM, 5, dtype=torch.float64).t()
    assert not rows.is_contiguous()
    groups = RowGroups.from_ids(IDS, S)
    expected = heads(rows.contiguous(), groups)
    torch.testing.assert_close(heads(rows, groups), expected)
    for dtype in (torch.float32, torch.bfloat16):
        got = copy.deepcopy(heads).to(dtype)(rows.to(dtype), groups)
        assert got.dtype == dtype
        close = 0.2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(got.double(), expected, atol=close, rtol=close)


def wrong_groups_are_named(kind: Callable[[int, int], Any]) -> None:
    heads = kind(S, DIM)
    with pytest.raises(StrataError, match="5 rows in 4 strata; got 4 rows"):
        heads(torch.randn(5, DIM), RowGroups.from_ids(IDS[:4], S))
    with pytest.raises(StrataError, match="in 5"):
        heads(torch.randn(5, DIM), RowGroups.from_ids(IDS, 5))


def the_state_gives_the_same_heads(kind: Callable[[int, int], Any]) -> None:
    heads, other = trained(kind), trained(kind, seed=1)
    rows, groups = torch.randn(5, DIM).double(), RowGroups.from_ids(IDS, S)
    assert not torch.equal(other(rows, groups), heads(rows, groups))
    other.load_state_dict(heads.state_dict())
    assert torch.equal(other(rows, groups), heads(rows, groups))


CHECKS = (
    untrained_heads_are_the_identity,
    untrained_heads_can_be_trained,
    every_parameter_has_the_strata_first,
    rows_go_through_the_head_of_their_stratum_alone,
    gradients_stay_inside_the_stratum,
    gradients_are_right,
    layouts_and_dtypes_do_not_matter,
    wrong_groups_are_named,
    the_state_gives_the_same_heads,
)
