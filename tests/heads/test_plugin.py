"""Plugin heads: identity at first, one a stratum, trained by their stratum alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.batches import ragged_batch
from torch import nn

from pinet_fast.aggregation import RowGroups
from pinet_fast.errors import ConfigError, StrataError
from pinet_fast.heads import PluginHeads
from pinet_fast.models import PINet, SASRec

IDS = torch.tensor([2, 0, 0, 3, 2])


def trained_heads(num_strata: int = 4, dim: int = 6) -> PluginHeads:
    heads = PluginHeads(num_strata, dim).double()
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn_like(p))
    return heads


def test_untrained_heads_are_the_identity() -> None:
    rows = torch.randn(5, 6)
    assert torch.equal(PluginHeads(4, 6)(rows, RowGroups.from_ids(IDS, 4)), rows)


@pytest.mark.parametrize("ids", [IDS, IDS.sort().values, IDS[:0], torch.tensor([3])])
def test_every_row_goes_through_the_head_of_its_stratum(ids: torch.Tensor) -> None:
    heads = trained_heads()
    rows = torch.randn(len(ids), 6, dtype=torch.float64)
    got = heads(rows, RowGroups.from_ids(ids, 4))
    for row, out, s in zip(rows, got, ids.tolist(), strict=True):
        inner = F.gelu(heads.down_weight[s] @ row + heads.down_bias[s])
        torch.testing.assert_close(out, row + heads.up_weight[s] @ inner + heads.up_bias[s])


def test_gradients_stay_inside_the_stratum() -> None:
    heads = trained_heads()
    rows = torch.randn(5, 6, dtype=torch.float64)
    out = heads(rows, RowGroups.from_ids(IDS, 4))
    out[IDS == 2].pow(2).sum().backward()
    for p in heads.parameters():
        assert p.grad is not None
        assert torch.equal(p.grad[[0, 1, 3]], torch.zeros_like(p.grad[[0, 1, 3]]))
        assert (p.grad[2] != 0).any()


def test_wrong_groups_and_sizes_are_named() -> None:
    heads = PluginHeads(4, 6)
    with pytest.raises(StrataError, match="5 rows in 4 strata; got 4 rows"):
        heads(torch.randn(5, 6), RowGroups.from_ids(IDS[:4], 4))
    with pytest.raises(StrataError, match="in 5"):
        heads(torch.randn(5, 6), RowGroups.from_ids(IDS, 5))
    with pytest.raises(ConfigError):
        PluginHeads(0, 6)


class TestPINet:
    def make(self) -> tuple[PINet, SASRec]:
        backbone = SASRec(20, max_len=8, dim=8)
        return PINet(backbone, PluginHeads(3, 8), edges=[4, 9]), backbone

    def test_untrained_it_is_the_frozen_backbone(self) -> None:
        net, backbone = self.make()
        net.train()
        batch = ragged_batch([0, 1, 2], [3, 5, 8], num_strata=3, num_items=20)
        backbone.eval()
        torch.testing.assert_close(net(batch), backbone(batch).detach())
        net(batch).sum().backward()
        assert all(p.grad is None for p in backbone.parameters())
        assert net.heads.up_weight.grad is not None

    def test_the_backbone_stays_in_evaluation_mode(self) -> None:
        net, backbone = self.make()
        net.train()
        assert net.heads.training
        assert not backbone.training
        assert not any(m.training for m in backbone.modules() if isinstance(m, nn.Dropout))

    def test_routing_is_kept_in_the_state(self) -> None:
        net, _ = self.make()
        activeness = torch.tensor([1, 3, 4, 8, 9, 500])
        assert net.route(activeness).tolist() == [0, 0, 1, 1, 2, 2]
        other = PINet(SASRec(20, max_len=8, dim=8), PluginHeads(3, 8), edges=[1, 2])
        other.load_state_dict(net.state_dict())
        assert other.route(activeness).tolist() == [0, 0, 1, 1, 2, 2]

    def test_edges_must_match_the_heads(self) -> None:
        with pytest.raises(StrataError, match="3 heads need 2 edges, got 1"):
            PINet(SASRec(5, dim=8), PluginHeads(3, 8), edges=[1])

    def test_edges_must_ascend(self) -> None:
        with pytest.raises(StrataError, match="ascending edges"):
            PINet(SASRec(5, dim=8), PluginHeads(3, 8), edges=[4, 4])

    @pytest.mark.parametrize("edges", [None, []])
    def test_strata_from_labels_train_but_do_not_route(self, edges: list[int] | None) -> None:
        net = PINet(SASRec(20, max_len=8, dim=8), PluginHeads(3, 8), edges)
        batch = ragged_batch([0, 1, 2], [3, 5, 8], num_strata=3, num_items=20)
        net.train()
        net(batch).sum().backward()
        assert net.heads.up_weight.grad is not None
        with pytest.raises(StrataError, match="made from labels"):
            net.route(torch.tensor([3]))
        other = PINet(SASRec(20, max_len=8, dim=8), PluginHeads(3, 8), edges)
        other.load_state_dict(net.state_dict())
