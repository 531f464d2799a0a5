"""What every model of the library does, with every loss: one contract, tried on all of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.batches import ragged_batch
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients, relative_error

from pinet_fast.models import DIN, GRU4Rec, PINet, SASRec
from pinet_fast.models.losses import LOSSES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from pinet_fast.data import RaggedBatch

V, S = 23, 3
LENGTHS = [5, 1, 9, 2, 7, 4, 3]
STRATA = [0, 0, 0, 1, 1, 2, 2]


def categories() -> Tensor:
    table = torch.randint(0, 5, (V + 1, 3), generator=torch.Generator().manual_seed(5))
    table[0] = 0
    table[4] = 0  # an item without any
    return table


MAKERS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{name}-{loss}-{'tied' if tied else 'untied'}": (
            lambda kind=kind, options=options, loss=loss, tied=tied: kind(
                V, dim=8, max_len=12, loss=loss, tied=tied, **options
            )
        )
        for name, kind, options in (
            ("sasrec", SASRec, {"num_heads": 2}),
            ("sasrec-post", SASRec, {"num_heads": 2, "norm": "post"}),
            ("gru4rec", GRU4Rec, {"num_layers": 2}),
        )
        for loss in LOSSES
        for tied in (True, False)
        if (tied and (name != "sasrec-post" or loss == "ce"))
        or (loss == "ss" and name == "gru4rec")
    },
    "din": lambda: DIN(V, dim=6, categories=categories()),
    "din-without-categories": lambda: DIN(V, dim=6),
    "din-mean": lambda: DIN(V, dim=6, categories=categories(), pooling="mean"),
}


def made(name: str) -> Any:
    torch.manual_seed(3)
    model = MAKERS[name]().double()
    with torch.no_grad():  # away from zeros and tiny weights, which would hide errors
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for table in ("items", "outputs", "categories", "bias"):
            if getattr(model, table, None) is not None:
                getattr(model, table).weight[0] = 0.0
    return model.eval()


def batch_of(
    strata: list[int] = STRATA, lengths: list[int] = LENGTHS, seed: int = 0, negatives: int = 3
) -> RaggedBatch:
    batch = ragged_batch(
        strata, lengths, num_strata=S, num_items=V, num_negatives=negatives, seed=seed
    )
    assert batch.negatives is not None
    log_q = -3 + torch.rand(batch.negatives.shape, dtype=torch.float64)
    return replace(batch, negatives_log_q=log_q)


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_one_aggregated_step_equals_autograd(name: str) -> None:
    """Stratum gradients of one intercepted pass, leak check on, against a pass a stratum."""
    model, batch = made(name), batch_of()
    parameters = list(model.parameters())
    rows = batch.strata.events
    assert rows is not None

    def run(opt: Any) -> None:
        with opt.stratify(batch.strata):
            losses = model(batch)
        opt.backward(losses)
        assert opt.report.leak == "proven"

    got = stratum_gradients(parameters, S, run)
    expected = autograd_stratum_gradients(lambda: model(batch), rows.ids, parameters, S)
    for (label, _), mine, theirs in zip(model.named_parameters(), got, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-10, label


def test_shapes_and_finite_gradients(name: str) -> None:
    model, batch = made(name), batch_of()
    losses = model(batch)
    assert losses.shape == (batch.num_events,)
    assert losses.dtype == torch.float64
    losses.sum().backward()
    for label, p in model.named_parameters():
        assert p.grad is not None, label
        assert p.grad.isfinite().all(), label
    assert torch.equal(model.items.weight.grad[0], torch.zeros_like(model.items.weight[0]))
    states = model.training_states(batch)
    assert states.shape[0] == batch.num_events
    assert states.shape[-1] == model.state_dim
    scores = model.serving_scores(model.serving_states(batch))
    assert scores.shape == (len(LENGTHS), V + 1)
    assert (scores[:, 0] == -torch.inf).all()


def test_losses_are_those_of_the_states(name: str) -> None:
    """A forward may look up once what ``training_states`` and ``training_losses`` look up apart."""
    model, batch = made(name), batch_of()
    expected = model.training_losses(model.training_states(batch), batch)
    torch.testing.assert_close(model(batch), expected)
    found = torch.autograd.grad(model(batch).sum(), model.items.weight)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), model.items.weight))


def test_a_subclass_with_states_of_its_own_is_asked_for_them() -> None:
    class Doubled(SASRec):
        def hidden(self, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return 2 * super().hidden(values, offsets)

    torch.manual_seed(0)
    plain, doubled = SASRec(V, dim=8, loss="bce").eval(), Doubled(V, dim=8, loss="bce").eval()
    doubled.load_state_dict(plain.state_dict())
    batch = ragged_batch(STRATA, LENGTHS, num_strata=S, num_items=V)
    states = plain.hidden(batch.values, batch.offsets)
    torch.testing.assert_close(doubled(batch), plain.event_losses(2 * states, batch))
    assert not torch.allclose(doubled(batch), plain(batch))


def test_candidates_have_the_scores_of_the_catalogue(name: str) -> None:
    model, batch = made(name), batch_of()
    items = torch.randint(1, V + 1, (len(LENGTHS), 4))
    everything = model.serving_scores(model.serving_states(batch))
    got = model.serving_scores(model.serving_states(batch, items), items)
    torch.testing.assert_close(got, everything.gather(1, items))


def test_rows_are_independent(name: str) -> None:
    model, batch = made(name), batch_of()
    together = model(batch)
    for b, (start, end) in enumerate(
        zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True)
    ):
        alone = replace(
            ragged_batch([STRATA[b]], [LENGTHS[b]], num_strata=S, num_items=V),
            values=batch.values[start:end], targets=batch.targets[start:end],
            negatives=batch.negatives[start:end], negatives_log_q=batch.negatives_log_q[start:end],
        )  # fmt: skip
        torch.testing.assert_close(model(alone), together[start:end])


def test_batches_without_events_or_users(name: str) -> None:
    model = made(name)
    for strata, lengths in (([], []), ([0, 2], [0, 0])):
        losses = model(batch_of(strata, lengths))
        assert losses.shape == (0,)
    with_empty = batch_of([0, 1, 2], [4, 0, 2])
    assert model(with_empty).isfinite().all()


def test_state_dict_gives_the_same_model(name: str) -> None:
    model, batch = made(name), batch_of()
    torch.manual_seed(9)
    other = MAKERS[name]().double().eval()
    assert not torch.equal(other(batch), model(batch))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(batch), model(batch))
    assert len({id(p) for p in model.parameters()}) == len(model.state_dict()) - len(
        [b for b in model.state_dict() if b == "item_categories"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    batch = batch_of()
    expected = made(name)(batch)
    got = made(name).to(dtype)(replace(batch, negatives_log_q=batch.negatives_log_q.to(dtype)))
    assert got.dtype == dtype
    rough = 1e-4 if dtype == torch.float32 else 0.15
    assert float((got.double() - expected).detach().abs().max()) < rough * float(
        expected.detach().max()
    )


def test_heads_go_on_top(name: str) -> None:
    """Untrained heads of any kind change no loss; trained ones change those of their stratum."""
    from pinet_fast.heads import head_names, make_heads

    model, batch = made(name), batch_of()
    expected = model(batch)
    for kind in head_names():
        net = PINet(model, make_heads(kind, S, model.state_dim).double(), [3, 5])
        torch.testing.assert_close(net(batch), expected)
        net(batch).sum().backward()
        assert any((p.grad != 0).any() for p in net.heads.parameters())
        with torch.no_grad():
            for p in net.heads.parameters():
                p[1] = torch.randn_like(p[1])
        changed = net(batch) != expected
        assert batch.strata.events is not None
        own = batch.strata.events.ids == 1
        assert not changed[~own].any() or torch.allclose(net(batch)[~own], expected[~own])
        assert changed[own].any()


def test_training_lowers_the_loss(name: str) -> None:
    torch.manual_seed(0)
    model, batch = MAKERS[name](), batch_of()
    batch = replace(batch, negatives_log_q=batch.negatives_log_q.float())
    opt = torch.optim.Adam(model.parameters(), lr=0.02)
    first = last = 0.0
    for _ in range(60):
        opt.zero_grad()
        loss = model(batch).mean()
        loss.backward()
        opt.step()
        last = float(loss.detach())
        first = first or last
    assert last < 0.8 * first, (first, last)
