"""Losses against their formulas, their limits, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.batches import ragged_batch

from pinet_fast.errors import ConfigError
from pinet_fast.models import SASRec
from pinet_fast.models.losses import (
    EventLoss,
    bayesian_personalised_ranking,
    binary_cross_entropy,
    gbce_power,
    generalised_bce,
    sampled_softmax,
)

POSITIVE = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NEGATIVES = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_formulas_by_hand() -> None:
    p, n = torch.sigmoid(POSITIVE), torch.sigmoid(NEGATIVES)
    bce = -p.log() - (1 - n).log().sum(1)
    torch.testing.assert_close(binary_cross_entropy(POSITIVE, NEGATIVES), bce)
    bpr = -torch.sigmoid(POSITIVE[:, None] - NEGATIVES).log().mean(1)
    torch.testing.assert_close(bayesian_personalised_ranking(POSITIVE, NEGATIVES), bpr)
    gbce = -(p**0.3).log() - (1 - n).log().sum(1)
    torch.testing.assert_close(generalised_bce(POSITIVE, NEGATIVES, 0.3), gbce)


def test_power_of_gbce_is_that_of_the_paper() -> None:
    """alpha (t (1 - 1 / alpha) + 1 / alpha): 1 at t = 0, the sampling rate alpha at t = 1."""
    assert gbce_power(1001, 100, 0.0) == 1.0
    assert gbce_power(1001, 100, 1.0) == pytest.approx(0.1)
    assert gbce_power(1001, 100, 0.75) == pytest.approx(0.1 * (0.75 * (1 - 10) + 10))
    assert gbce_power(2, 50, 0.5) == 1.0  # more negatives than items: every item is one


def test_sampled_softmax_estimates_the_softmax() -> None:
    """The sum under the logarithm is right on average, for any distribution of the negatives."""
    torch.manual_seed(0)
    scores = torch.randn(12, dtype=torch.float64)
    q = torch.rand(11, dtype=torch.float64) + 0.2
    q = q / q.sum()
    drawn = torch.multinomial(q, 400_000 * 5, replacement=True).view(-1, 5)
    target = scores[:1].expand(len(drawn))
    loss = sampled_softmax(target, scores[1:][drawn], q.log()[drawn])
    estimate = (loss + target).exp().mean()
    assert float(estimate) == pytest.approx(float(scores.exp().sum()), rel=3e-3)
    # All of the catalogue drawn once, each with the probability of an even draw: the softmax.
    everything = torch.arange(11).unsqueeze(0)
    log_q = torch.full((1, 11), -torch.log(torch.tensor(11.0)).item(), dtype=torch.float64)
    exact = sampled_softmax(scores[:1], scores[1:][everything], log_q)
    torch.testing.assert_close(exact, -torch.log_softmax(scores, 0)[:1])


def test_a_negative_that_is_the_target_does_not_count() -> None:
    log_q = torch.full((6, 4), -2.0, dtype=torch.float64)
    hits = torch.zeros(6, 4, dtype=torch.bool)
    hits[:, 2] = True
    got = sampled_softmax(POSITIVE, NEGATIVES, log_q, hits)
    n = (NEGATIVES - log_q).exp() / 4
    expected = torch.log(POSITIVE.exp() + n[:, [0, 1, 3]].sum(1)) - POSITIVE
    torch.testing.assert_close(got, expected)
    all_hits = sampled_softmax(POSITIVE, NEGATIVES, log_q, ~torch.zeros_like(hits))
    torch.testing.assert_close(all_hits, torch.zeros(6, dtype=torch.float64), atol=1e-15, rtol=0)


def test_extreme_scores_stay_finite() -> None:
    big = torch.tensor([300.0, -300.0])
    others = torch.tensor([[300.0], [-300.0]])
    for loss in (
        binary_cross_entropy(-big, others),
        bayesian_personalised_ranking(-big, others),
        generalised_bce(-big, others, 0.5),
        sampled_softmax(-big, others, torch.zeros(2, 1)),
    ):
        assert loss.isfinite().all()
        assert (loss >= 0).all()


@pytest.mark.parametrize("loss", ["ss", "bpr", "gbce"])
@pytest.mark.parametrize("lengths", [[4, 6, 1], [1, 1, 1]])
def test_negatives_per_user_and_batch(loss: str, lengths: list[int]) -> None:
    torch.manual_seed(0)
    net = SASRec(30, max_len=12, dim=8, loss=loss).double().eval()
    batch = ragged_batch([0, 0, 1], lengths, num_strata=2, num_items=30)
    for shape in ((3, 4), (4,)):
        drawn, log_q = torch.randint(1, 31, shape), torch.randn(shape).double()
        owner = [b for b, n in enumerate(lengths) for _ in range(n)]
        rows = [drawn[b] if len(shape) == 2 else drawn for b in owner]
        logs = [log_q[b] if len(shape) == 2 else log_q for b in owner]
        by_event = replace(batch, negatives=torch.stack(rows), negatives_log_q=torch.stack(logs))
        torch.testing.assert_close(
            net(replace(batch, negatives=drawn, negatives_log_q=log_q)), net(by_event)
        )


def test_what_is_missing_is_named() -> None:
    batch = ragged_batch([0], [3], num_strata=1, num_items=30)
    net = SASRec(30, max_len=5, dim=8, loss="ss")
    with pytest.raises(ConfigError, match=r"negatives_log_q; use negatives=Negatives\(log_q=True"):
        net(batch)
    with pytest.raises(ConfigError, match=r"expected batch.targets of 3 events, got \[1\]"):
        net(replace(batch, targets=torch.tensor([1])))
    with pytest.raises(ConfigError, match="expected one of ce, bce, ss, bpr, gbce; got 'mse'"):
        EventLoss("mse")
    with pytest.raises(ConfigError, match="gbce_t"):
        EventLoss("gbce", 1.5)
