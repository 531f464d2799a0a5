"""Top-k for users by their histories."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pinet_fast.errors import ConfigError, StrataError
from pinet_fast.heads import PluginHeads
from pinet_fast.models import DIN, GRU4Rec, PINet, SASRec

V = 15
HISTORIES = [[3, 5], [1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 2, 11]]


def made(kind: Any, **options: Any) -> PINet:
    torch.manual_seed(0)
    backbone = kind(V, max_len=5, dim=8, **options)
    net = PINet(backbone, PluginHeads(3, backbone.state_dim), edges=[2, 4])
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


NETS = [(SASRec, {}), (GRU4Rec, {"tied": False}), (DIN, {})]


@pytest.mark.parametrize(("kind", "options"), NETS)
def test_topk_is_a_sort_of_each_users_own_scores(kind: Any, options: dict[str, Any]) -> None:
    """One user at a time, with the head of the stratum that the length gives."""
    net = made(kind, **options)
    net.train()
    items, scores = net.topk(HISTORIES, 4)
    assert net.training  # as it was
    net.eval()
    for user, (history, stratum) in enumerate(zip(HISTORIES, [1, 2, 0, 2], strict=True)):
        alone, own = net.topk([history], 4, strata=[stratum])
        assert alone.tolist() == items[user : user + 1].tolist()
        torch.testing.assert_close(own, scores[user : user + 1])
        assert not set(items[user].tolist()) & set(history)
        assert 0 not in items[user]
        everything, all_scores = net.topk([history], V, include_history=True)
        assert sorted(everything[0].tolist()) == list(range(1, V + 1))
        assert (all_scores[0].diff() <= 0).all()
        kept = [i for i in everything[0].tolist() if i not in history][:4]
        assert kept == items[user].tolist()


def test_the_stratum_decides_the_head() -> None:
    net = made(SASRec)
    by_length = net.topk(HISTORIES, 5)[1]
    as_tail = net.topk(HISTORIES, 5, strata=[0, 0, 0, 0])[1]
    torch.testing.assert_close(by_length[2], as_tail[2])  # one event: tail either way
    assert not torch.allclose(by_length[1], as_tail[1], rtol=1e-3)


def test_long_histories_are_cut_but_counted_and_masked_whole() -> None:
    net = made(GRU4Rec)
    history = [1, 2, 3, 4, 5, 6, 7, 8]
    items = net.topk([history], 7)[0][0].tolist()
    assert sorted(items) == [9, 10, 11, 12, 13, 14, 15]
    cut, whole = (
        net.topk([history[-5:]], V, include_history=True),
        net.topk([history], V, include_history=True),
    )
    assert torch.equal(cut[0], whole[0])  # both of the last stratum, the same five events shown


def test_fewer_items_than_asked_for_end_in_infinity() -> None:
    net = made(SASRec)
    items, scores = net.topk([list(range(1, 14))], 4)
    assert set(items[0, :2].tolist()) == {14, 15}
    assert scores[0, :2].isfinite().all()
    assert (scores[0, 2:] == -torch.inf).all()


def test_bad_input_is_named() -> None:
    net = made(SASRec)
    for k in (0, V + 1):
        with pytest.raises(ConfigError, match="expected 1 <= k <= 15"):
            net.topk(HISTORIES, k)
    for bad in ([], [0], [V + 1]):
        with pytest.raises(ConfigError, match="history of user 1"):
            net.topk([[1], bad], 2)
    with pytest.raises(StrataError, match="expected 4 strata, got 1"):
        net.topk(HISTORIES, 2, strata=[0])
    assert net.topk([], 3)[0].shape == (0, 3)
    labels = PINet(SASRec(V, dim=8), PluginHeads(3, 8), edges=None)
    with pytest.raises(StrataError, match="made from labels"):
        labels.topk([[1]], 2)
    assert labels.topk([[1]], 2, strata=[1])[0].shape == (1, 2)
