"""Loops that call ``loss.backward()`` on a reduced loss, and terms without rows in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pytest
import torch
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator, StrataIndex
from pinet_fast.errors import AggregationError, ConfigError, RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2])
LENGTHS = torch.tensor([3, 1, 4, 2, 2, 5, 1])
B, T, S = 7, 18, 3


def net(width: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def rows(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 5, dtype=torch.float64, generator=generator)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("where", ["inside", "after", "opt.backward"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scalar_over_users(where: str, reduction: Literal["mean", "sum"]) -> None:
    model = net()
    x = rows(B)
    parameters = list(model.parameters())
    expected = autograd_stratum_gradients(lambda: model(x).square(), IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS, reduction=reduction):
            losses = model(x).square()
            loss = losses.mean() if reduction == "mean" else losses.sum()
            if where == "inside":
                loss.backward()
        if where == "after":
            loss.backward()
        if where == "opt.backward":
            opt.backward(loss)
        assert opt.report.leak == "unchecked"
        assert opt.report.losses is None
        assert opt.report.counts == (2, 2, 3)

    assert_same(stratum_gradients(parameters, S, run), expected)


@pytest.mark.parametrize("mask", [False, True])
def test_a_scalar_over_events(mask: bool) -> None:
    model = net()
    x = rows(T)
    weights = (torch.arange(T) % 3 != 0).double() if mask else torch.ones(T, dtype=torch.float64)
    parameters = list(model.parameters())
    event_ids = IDS.repeat_interleave(LENGTHS)

    def mean_of(s: int) -> Tensor:
        kept = (event_ids == s).double() * weights
        return (model(x).squeeze(1).square() * kept).sum() / kept.sum()

    expected = [torch.stack(g) for g in zip(
        *(torch.autograd.grad(mean_of(s), parameters) for s in range(S)), strict=True)]  # fmt: skip

    def run(opt: GradientAggregator) -> None:
        index = StrataIndex(IDS, S, LENGTHS)
        with opt.stratify(index, reduction="mean", row_weights=weights if mask else None):
            losses = model(x).squeeze(1).square()
            loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        assert opt.report.unit == "events"

    assert_same(stratum_gradients(parameters, S, run), expected)


def test_an_absent_stratum_gets_nothing() -> None:
    model = net()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement", num_strata=4)
    with opt.stratify(IDS, reduction="mean"):
        loss = model(rows(B)).square().mean()
    loss.backward()
    assert opt.report.gram is not None
    assert opt.report.weights is not None
    assert not opt.report.gram[3].any()
    assert not opt.report.weights[:, 3].any()
    opt.step()


def test_a_second_backward_over_the_same_forward_adds_up() -> None:
    model = net()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS, reduction="mean"):
        loss = model(rows(B)).square().mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    for p, before in zip(model.parameters(), once, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 2 * before)


def test_grad_scaler_and_a_scalar_loss() -> None:
    models = [net(), net()]
    for model, scaled in zip(models, (False, True), strict=True):
        opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        with opt.stratify(IDS, reduction="mean"):
            loss = model(rows(B)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_reduction_a_scalar_backward_is_an_error() -> None:
    model = net()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with pytest.raises(AggregationError, match='reduction="mean"'), opt.stratify(IDS):
        model(rows(B)).square().mean().backward()
    with opt.stratify(IDS):
        loss = model(rows(B)).square().mean()
    with pytest.raises(AggregationError, match='reduction="mean"'):
        loss.backward()
    with pytest.raises(AggregationError, match=r"opt\.backward\(losses\) was not called"):
        opt.step()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_gradients_are_refused() -> None:
    model = net()
    x = rows(B).requires_grad_()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with pytest.raises(AggregationError, match="create_graph"), opt.stratify(IDS):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_backward_calls_of_something_else_pass_through() -> None:
    model, other = net(), net()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS):
        losses = model(rows(B)).square()
        other(rows(B)).square().mean().backward()
    opt.backward(losses.squeeze(1))
    assert all(p.grad is not None for p in [*model.parameters(), *other.parameters()])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"reduction": "none"}, ConfigError, "mean"),
        ({"row_weights": torch.ones(B)}, ConfigError, "reduction="),
        ({"reduction": "mean", "row_weights": -torch.ones(B)}, AggregationError, ">= 0"),
        ({"reduction": "mean", "row_weights": torch.ones(5)}, RowLayoutError, "row_weights"),
        ({"rows": {"layer.wieght": (0, IDS)}}, ConfigError, "names no parameter"),
    ],
)
def test_misuse(arguments: dict[str, object], error: type[Exception], match: str) -> None:
    model = net()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with pytest.raises(error, match=match), opt.stratify(IDS, **arguments):  # type: ignore[arg-type]
        pass
    with opt.stratify(IDS):  # and it is usable still
        losses = model(rows(B)).square()
    opt.backward(losses.squeeze(1))


def test_vectors_and_exact_mode_do_not_go_with_a_reduction() -> None:
    model = net()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS, reduction="mean"):
        losses = model(rows(B)).square()
    with pytest.raises(AggregationError, match="drop reduction="):
        opt.backward(losses)
    exact = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), mode="exact")
    with pytest.raises(ConfigError, match="exact"), exact.stratify(IDS, reduction="mean"):
        pass


def test_a_parameter_outside_every_boundary_is_named() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
            return x * weight

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
            return grad, grad.sum(0)

    model = net()
    weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
    opt = GradientAggregator(torch.optim.SGD([*model.parameters(), weight], lr=0.1), "agreement")
    with opt.stratify(IDS, reduction="mean"):
        loss = model(Hidden.apply(rows(B), weight)).square().mean()
    with pytest.raises(AggregationError, match="parameter 4 of group 0 got gradient outside"):
        loss.backward()


# Terms without rows -----------------------------------------------------------------------------

PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "right": lambda losses, penalty: losses + penalty,
    "left": lambda losses, penalty: penalty + losses,
    "minus": lambda losses, penalty: losses - (-penalty),
    "in place": lambda losses, penalty: losses.clone().add_(penalty),
    "scaled": lambda losses, penalty: 3.0 * (losses + penalty) / 3.0,
    "alpha": lambda losses, penalty: torch.add(losses, penalty / 2, alpha=2),
    "twice": lambda losses, penalty: (losses + 0.5 * penalty) + 0.5 * penalty,
}


@pytest.mark.parametrize("how", PENALTIES)
def test_a_penalty_in_the_losses_is_added_once_after_the_rule(how: str) -> None:
    model = net()
    x = rows(B)

    def gradients(with_penalty: bool) -> tuple[list[Tensor], Tensor]:
        opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "balanced")
        opt.zero_grad()
        with opt.stratify(IDS):
            losses = model(x).squeeze(1).square()
            if with_penalty:
                penalty = 0.3 * sum(p.pow(2).sum() for p in model.parameters())
                assert isinstance(penalty, Tensor)
                losses = PENALTIES[how](losses, penalty)
        opt.backward(losses)
        assert opt.report.gram is not None
        return [p.grad for p in model.parameters() if p.grad is not None], opt.report.gram

    plain, gram = gradients(with_penalty=False)
    penalised, gram_with = gradients(with_penalty=True)
    torch.testing.assert_close(gram_with, gram, rtol=1e-12, atol=0)
    for p, before, after in zip(model.parameters(), plain, penalised, strict=True):
        torch.testing.assert_close(after - before, 0.6 * p.detach(), rtol=1e-9, atol=1e-12)


def test_a_penalty_in_a_scalar_loss_is_added_once() -> None:
    model = net()
    x = rows(B)
    parameters = list(model.parameters())
    gradients = []
    for scale in (0.0, 0.3):
        opt = GradientAggregator(torch.optim.SGD(parameters, lr=0.1), "balanced")
        opt.zero_grad()
        with opt.stratify(IDS, reduction="mean"):
            loss = model(x).square().mean()
            if scale:
                for p in parameters:
                    loss += scale * torch.norm(p) ** 2
        loss.backward()
        gradients.append([p.grad for p in parameters if p.grad is not None])
    for p, before, after in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(after - before, 0.6 * p.detach(), rtol=1e-9, atol=1e-12)


def test_a_parameter_in_the_penalty_alone_gets_it() -> None:
    model = net()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = GradientAggregator(torch.optim.SGD([*model.parameters(), unused], lr=0.1), "agreement")
    with opt.stratify(IDS):
        losses = model(rows(B)).squeeze(1).square() + unused.square().sum()
    opt.backward(losses)
    torch.testing.assert_close(unused.grad, 2 * unused.detach())


def test_a_derived_number_that_scales_rows_is_a_boundary() -> None:
    """A learned temperature or offset below the loss is no penalty."""
    model = net()
    number = nn.Parameter(torch.tensor([0.7, 0.2], dtype=torch.float64))
    x = rows(B)
    parameters = [*model.parameters(), number]

    def losses() -> Tensor:
        out = model(x).squeeze(1)
        return (out * number.exp().sum() + number.square().sum()).square()

    expected = autograd_stratum_gradients(losses, IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            values = losses()
        opt.backward(values)

    assert_same(stratum_gradients(parameters, S, run), expected)
