"""SASRec on ragged batches equals a padded one, is causal, and leaves padding untrained."""

from __future__ import annotations

import pytest
import torch
from support.batches import ragged_batch

from pinet_fast.errors import ConfigError
from pinet_fast.models import SASRec


def model(loss: str = "ce", **options: object) -> SASRec:
    torch.manual_seed(3)
    net = SASRec(30, max_len=12, dim=16, num_heads=2, loss=loss, **options)  # type: ignore[arg-type]
    return net.double().eval()


def test_a_user_is_not_touched_by_the_others() -> None:
    net = model()
    batch = ragged_batch([0, 0, 1], [5, 9, 2], num_strata=2, num_items=30)
    together = net.hidden(batch.values, batch.offsets)
    for a, b in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        alone = net.hidden(batch.values[a:b], torch.tensor([0, b - a]))
        torch.testing.assert_close(alone, together[a:b])


def test_states_do_not_see_later_items() -> None:
    """Only the count of later events may matter (positions run from the end), never their items."""
    net = model()
    values = torch.tensor([4, 7, 1, 9, 3])
    offsets = torch.tensor([0, 5])
    before = net.hidden(values, offsets)
    changed = values.clone()
    changed[3:] = torch.tensor([20, 21])
    after = net.hidden(changed, offsets)
    torch.testing.assert_close(after[:3], before[:3])
    assert not torch.allclose(after[3:], before[3:])


def test_padding_is_never_recommended_nor_trained() -> None:
    net = model()
    batch = ragged_batch([0, 1], [4, 6], num_strata=2, num_items=30)
    assert (net.scores(net.hidden(batch.values, batch.offsets))[:, 0] == -torch.inf).all()
    net.train()
    net(batch).sum().backward()
    grad = net.items.weight.grad
    assert grad is not None
    assert torch.equal(grad[0], torch.zeros(16, dtype=torch.float64))
    assert grad.isfinite().all()
    assert (grad[1:] != 0).any(1).all()  # full softmax reaches every other item


def test_bce_is_the_stated_loss() -> None:
    net = model("bce")
    batch = ragged_batch([0, 1], [4, 6], num_strata=2, num_items=30, num_negatives=3)
    assert batch.targets is not None
    assert batch.negatives is not None
    scores = net.scores(net.hidden(batch.values, batch.offsets))
    positive = torch.sigmoid(scores.gather(1, batch.targets[:, None]))
    negative = torch.sigmoid(scores.gather(1, batch.negatives))
    expected = -positive.log().sum(1) - (1 - negative).log().sum(1)
    torch.testing.assert_close(net(batch), expected)


@pytest.mark.parametrize("lengths", [[4, 6, 1], [1, 1, 1]])
def test_bce_takes_negatives_per_user_and_per_batch(lengths: list[int]) -> None:
    """Those of a user go with each of its events, those of the batch with all of them."""
    from dataclasses import replace

    net = model("bce")
    batch = ragged_batch([0, 0, 1], lengths, num_strata=2, num_items=30)
    generator = torch.Generator().manual_seed(1)
    for shape in ((3, 4), (4,)):
        drawn = torch.randint(1, 31, shape, generator=generator)
        owner = [b for b, n in enumerate(lengths) for _ in range(n)]
        rows = [drawn[b] if len(shape) == 2 else drawn for b in owner]
        expected = net(replace(batch, negatives=torch.stack(rows)))
        torch.testing.assert_close(net(replace(batch, negatives=drawn)), expected)
    with pytest.raises(ConfigError, match=r"per event \[\d+, n\], user \[3, n\] or batch \[n\]"):
        net(replace(batch, negatives=torch.ones(2, 4, dtype=torch.int64)))


def test_ce_is_the_log_softmax_over_real_items() -> None:
    net = model()
    batch = ragged_batch([0, 1], [4, 6], num_strata=2, num_items=30)
    assert batch.targets is not None
    scores = net.scores(net.hidden(batch.values, batch.offsets))[:, 1:]
    expected = -torch.log_softmax(scores, 1).gather(1, batch.targets[:, None] - 1)[:, 0]
    torch.testing.assert_close(net(batch), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "mse"}, "loss: expected one of"),
        ({"dim": 10, "num_heads": 3}, "does not divide"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SASRec(5, **options)  # type: ignore[arg-type]


def test_missing_targets_or_negatives_are_named() -> None:
    from dataclasses import replace

    batch = ragged_batch([0], [3], num_strata=1, num_items=30)
    with pytest.raises(ConfigError, match="targets"):
        model()(replace(batch, targets=None))
    with pytest.raises(ConfigError, match="negatives"):
        model("bce")(replace(batch, negatives=None))
