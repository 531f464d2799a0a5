"""Negatives of the whole batch are scored as one pool, with exact stratum gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from support.batches import ragged_batch
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients

import pinet_fast
from pinet_fast.aggregation import GradientAggregator
from pinet_fast.models import GRU4Rec, SASRec

if TYPE_CHECKING:
    from pinet_fast.models.sequence import SequenceModel

IDS, LENGTHS, S, V = [0, 1, 2], [4, 1, 6], 3, 30


@pytest.mark.parametrize("model", [SASRec, GRU4Rec])
@pytest.mark.parametrize("loss", ["ss", "bce", "bpr", "gbce"])
@pytest.mark.parametrize("pool", [1, 3, 7, 11])  # 3 users, 11 events: sizes that look like rows
@pytest.mark.parametrize("tied", [True, False])
def test_stratum_gradients(model: type[SequenceModel], loss: str, pool: int, tied: bool) -> None:
    torch.manual_seed(pool)
    net = model(V, max_len=12, dim=8, loss=loss, tied=tied).double()  # type: ignore[call-arg, arg-type]
    net.eval()
    batch = ragged_batch(IDS, LENGTHS, num_strata=S, num_items=V)
    drawn, log_q = torch.randint(1, V + 1, (pool,)), torch.randn(pool).double()
    batch = replace(batch, negatives=drawn, negatives_log_q=log_q)
    rows = torch.tensor(IDS).repeat_interleave(torch.tensor(LENGTHS))
    parameters = list(net.parameters())
    by_event = replace(
        batch, negatives=drawn.expand(len(rows), -1), negatives_log_q=log_q.expand(len(rows), -1)
    )
    torch.testing.assert_close(net(batch), net(by_event))
    expected = autograd_stratum_gradients(lambda: net(by_event), rows, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(batch.strata):
            losses = net(batch)
        opt.backward(losses)

    for got, wanted in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


def test_shared_without_an_aggregator_changes_nothing() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    with pinet_fast.shared():
        out = weight.sum()
    (gradient,) = torch.autograd.grad(out, weight)
    torch.testing.assert_close(gradient, torch.ones(5, 3))


def test_shared_is_left_after_an_error() -> None:
    layer = torch.nn.Linear(3, 2)
    opt = GradientAggregator(torch.optim.SGD(layer.parameters(), lr=0.1), "agreement", num_strata=2)
    rows = torch.randn(4, 3)
    with opt.stratify([0, 1, 1, 0]):
        with pytest.raises(ZeroDivisionError), pinet_fast.shared():
            raise ZeroDivisionError
        losses = layer(rows).sum(1)
    opt.backward(losses)
    assert opt.report.leak == "proven"  # the rows are rows again


def test_a_compiled_model_with_a_pool_stays_one_graph() -> None:
    net = SASRec(V, max_len=12, dim=8, loss="ss").eval()
    batch = ragged_batch(IDS, LENGTHS, num_strata=S, num_items=V)
    batch = replace(batch, negatives=torch.arange(1, 8), negatives_log_q=torch.zeros(7))
    compiled = torch.compile(net.pool_scores, backend="eager", fullgraph=True)
    hidden = torch.randn(batch.num_events, 8)
    torch.testing.assert_close(
        compiled(hidden, batch.negatives), net.pool_scores(hidden, batch.negatives)
    )
