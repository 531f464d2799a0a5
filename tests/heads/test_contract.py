"""Every registered kind of heads keeps the contract, and the registry keeps its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.head_contract import CHECKS, IDS, S, trained

from pinet_fast.aggregation import RowGroups
from pinet_fast.errors import ConfigError
from pinet_fast.heads import (
    GatedHeads,
    Heads,
    PluginHeads,
    PredictionHeads,
    head_names,
    make_heads,
    register_head,
)
from pinet_fast.heads.base import _KINDS

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("name", head_names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Any], None], name: str) -> None:
    check(lambda num_strata, dim: make_heads(name, num_strata, dim))


class Blended(Heads):
    """Breaks the contract on purpose: rows see the other rows."""

    def __init__(self, num_strata: int, dim: int) -> None:
        super().__init__()
        self.num_strata = num_strata
        self.weight = torch.nn.Parameter(torch.zeros(num_strata, dim))

    def forward(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        return rows + rows.mean(0) * self.weight[groups.ids]


def test_the_contract_can_fail() -> None:
    failed = []
    for check in CHECKS:
        try:
            check(Blended)
        except (Exception, pytest.fail.Exception):
            failed.append(check.__name__)
    assert "rows_go_through_the_head_of_their_stratum_alone" in failed
    assert "wrong_groups_are_named" in failed


def test_prediction_heads_are_a_layer_a_stratum() -> None:
    heads = trained(PredictionHeads)
    rows = torch.randn(5, 6, dtype=torch.float64)
    got = heads(rows, RowGroups.from_ids(IDS, S))
    for row, out, s in zip(rows, got, IDS.tolist(), strict=True):
        torch.testing.assert_close(out, row + heads.weight[s] @ row + heads.bias[s])


def test_a_gate_is_between_nothing_and_the_plugin() -> None:
    heads = trained(GatedHeads)
    rows, groups = torch.randn(5, 6, dtype=torch.float64), RowGroups.from_ids(IDS, S)
    plugin = PluginHeads.forward(heads, rows, groups)
    with torch.no_grad():
        gate = torch.sigmoid((rows * heads.gate_weight[IDS]).sum(1) + heads.gate_bias[IDS])
        torch.testing.assert_close(heads(rows, groups), torch.lerp(rows, plugin, gate[:, None]))
        heads.gate_weight.zero_()
        heads.gate_bias.fill_(-1e3)
        torch.testing.assert_close(heads(rows, groups), rows)
        heads.gate_bias.fill_(1e3)
        torch.testing.assert_close(heads(rows, groups), plugin)


def test_registry() -> None:
    assert head_names() == ("gate", "plugin", "prediction")
    with pytest.raises(ConfigError, match="got 'pluging'; did you mean 'plugin'"):
        make_heads("pluging", 2, 4)
    with pytest.raises(ConfigError, match="'gate' is taken"):
        register_head("gate", PluginHeads)
    register_head("gate", GatedHeads)  # again: nothing changes
    try:
        register_head("blended", Blended)
        assert isinstance(make_heads("blended", 2, 4), Blended)
    finally:
        _KINDS.pop("blended")
    with pytest.raises(ConfigError, match="S, d >= 1"):
        PredictionHeads(0, 4)
