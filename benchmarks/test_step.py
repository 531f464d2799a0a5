"""Cost of an aggregated training step relative to a plain one, optimizer step included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pinet_fast import GradientAggregator, RaggedBatch, SASRec, StrataIndex
from pinet_fast.kernels import _registry

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_ITEMS = 3416
USERS, LENGTH = 128, 50


def full_batch(num_strata: int) -> RaggedBatch:
    """SASRec of the design's goals: B=128, L=50, d=64, V=3,416, one negative."""
    generator = torch.Generator().manual_seed(0)

    def items(*shape: int) -> torch.Tensor:
        return torch.randint(1, NUM_ITEMS + 1, shape, generator=generator)

    lengths = torch.full((USERS,), LENGTH)
    ids = torch.arange(USERS) * num_strata // USERS
    return RaggedBatch(
        values=items(USERS * LENGTH),
        offsets=torch.arange(USERS + 1) * LENGTH,
        strata=StrataIndex(ids, num_strata, lengths),
        users=torch.arange(USERS),
        targets=items(USERS * LENGTH),
        negatives=items(USERS * LENGTH, 1),
        max_len=LENGTH,
    )


def make(loss: str) -> SASRec:
    torch.manual_seed(0)
    return SASRec(NUM_ITEMS, max_len=LENGTH, loss=loss, dropout=0.2)  # type: ignore[arg-type]


def check_gradient(batch: RaggedBatch, loss: str, rule: str) -> None:
    """The step that is timed must be right: compare with autograd on the weighted losses."""
    model = make(loss).eval()
    opt = GradientAggregator(torch.optim.Adam(model.parameters()), rule)
    with opt.stratify(batch.strata):
        losses = model(batch)
    opt.backward(losses)
    weights = opt.report.weights
    assert weights is not None
    losses = model(batch)
    events = batch.strata.events
    assert events is not None
    parameters = list(model.parameters())
    for s in range(batch.strata.num_strata):
        parts = torch.autograd.grad(losses[events.ids == s].mean(), parameters, retain_graph=True)
        for i, (p, part) in enumerate(zip(parameters, parts, strict=True)):
            weight = weights[s] if weights.dim() == 1 else weights[i, s]
            assert p.grad is not None
            p.grad -= weight.float() * part
    for p in parameters:
        assert p.grad is not None
        assert float(p.grad.abs().max()) < 1e-6


def steps(
    batch: RaggedBatch, loss: str, rule: str
) -> tuple[Callable[[], None], Callable[[], None], GradientAggregator]:
    """Return an aggregated step, a plain one, and the former's wrapper."""
    plain_model, model = make(loss), make(loss)
    plain_opt = torch.optim.Adam(plain_model.parameters())
    opt = GradientAggregator(torch.optim.Adam(model.parameters()), rule)

    def plain() -> None:
        plain_opt.zero_grad()
        plain_model(batch).mean().backward()
        plain_opt.step()

    def aggregated() -> None:
        opt.zero_grad()
        with opt.stratify(batch.strata):
            losses = model(batch)
        opt.backward(losses)
        opt.step()

    return aggregated, plain, opt


@pytest.mark.parametrize("num_strata", [4, 8])
@pytest.mark.parametrize(
    ("rule", "loss"),
    [
        ("backdoor", "bce"), ("agreement", "bce"), ("balanced", "bce"), ("mgda", "bce"),
        ("backdoor", "ce"), ("agreement", "ce"), ("balanced", "ce"), ("mgda", "ce"),
    ],
)  # fmt: skip
def test_aggregated_step(
    rule: str, loss: str, num_strata: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    benchmark.group = "step"
    batch = full_batch(num_strata)
    check_gradient(batch, loss, rule)
    aggregated, plain, opt = steps(batch, loss, rule)
    # Reweighting is held to 1%, which 40 rounds do not tell from noise.
    result = paired(aggregated, plain, rounds=200 if (rule, loss) == ("backdoor", "bce") else 40)
    assert result.ratio > 0
    if rule != "backdoor":
        assert opt.report.leak == "proven"


@pytest.mark.parametrize("num_strata", [4, 8])
@pytest.mark.parametrize("rule", ["agreement", "balanced", "mgda"])
@pytest.mark.parametrize("ops", ["all", "aggregation"])
def test_aggregated_step_of_the_reference_backend(
    ops: str,
    rule: str,
    num_strata: int,
    paired: Callable[..., Any],
    benchmark: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without compiled kernels, as ``PINET_FAST_BACKEND=reference`` has it, BCE.

    Both steps call ``ragged_attention``. With ``ops="all"`` it is the reference's in both, which
    makes both slower; with ``"aggregation"`` both have the default one, and the reference serves
    what the plain step does not call.
    """
    benchmark.group = "step"
    for op in _registry.ops():
        if ops == "all" or not op.startswith("ragged_attention"):
            monkeypatch.setitem(_registry._ops, op, _registry.backends(op)[-1:])
            assert [backend.name for backend in _registry.backends(op)] == ["reference"]
    batch = full_batch(num_strata)
    check_gradient(batch, "bce", rule)
    aggregated, plain, opt = steps(batch, "bce", rule)
    # Ratios of 40 rounds differ by several percent from run to run where a host is busy.
    result = paired(aggregated, plain, rounds=120)
    assert result.ratio > 0
    assert opt.report.leak == "proven"
