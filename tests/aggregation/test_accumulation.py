"""Several backwards before a step, hooks on parameters, and absent strata."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.errors import ConfigError
from pinet_fast.rules import Backdoor

if TYPE_CHECKING:
    from collections.abc import Sequence

IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0])
X = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ITEMS = torch.tensor([1, 5, 2, 2, 8, 0, 3, 5])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)
        self.table = nn.Embedding(10, 3)

    def losses(self, rows: Sequence[int]) -> Tensor:
        users = self.net(X[rows].tanh())
        return (users * self.table(ITEMS[rows])).sum(1).exp()


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def accumulate(net: Model, opt: GradientAggregator, parts: Sequence[Sequence[int]]) -> None:
    for part in parts:
        with opt.stratify(IDS[list(part)], num_strata=3):
            losses = net.losses(list(part))
        opt.backward(losses)


@pytest.mark.parametrize("rule", ["agreement", "balanced", "mgda", "pcgrad", "signagreement"])
def test_accumulation_combines_the_summed_stratum_gradients(rule: str) -> None:
    """Two micro-batches with equal counts by stratum are as one batch of both, times two."""
    parts = [[1, 2, 0], [4, 3, 5]]  # one user of each stratum in either
    net = model()
    opt = GradientAggregator(torch.optim.SGD(net.parameters(), lr=0.1), rule)
    accumulate(net, opt, parts)
    report = opt.report
    accumulated = [p.grad for p in net.parameters()]
    opt.zero_grad()
    accumulate(net, opt, [parts[0] + parts[1]])
    assert report.gram is not None
    assert opt.report.gram is not None
    torch.testing.assert_close(report.gram, 4 * opt.report.gram, rtol=1e-9, atol=1e-12)
    for mine, p in zip(accumulated, net.parameters(), strict=True):
        assert mine is not None
        assert p.grad is not None
        torch.testing.assert_close(mine, 2 * p.grad, rtol=1e-9, atol=1e-12)


def test_strata_missing_from_one_part_are_there_in_the_sum() -> None:
    net = model()
    opt = GradientAggregator(torch.optim.SGD(net.parameters(), lr=0.1), "balanced")
    accumulate(net, opt, [[1, 4], [0, 5, 2]])
    assert opt.report.weights is not None
    assert bool((opt.report.weights > 0).all())


def test_gradients_from_elsewhere_are_kept() -> None:
    net = model()
    opt = GradientAggregator(torch.optim.SGD(net.parameters(), lr=0.1), "agreement")
    net.losses([0, 1]).sum().backward()
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    accumulate(net, opt, [[1, 2, 0]])
    accumulate(net, opt, [[4, 3, 5]])
    both = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    opt.zero_grad()
    accumulate(net, opt, [[1, 2, 0], [4, 3, 5]])
    for total, own, p in zip(both, before, net.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(total - own, p.grad)


@pytest.mark.parametrize("how", ["model.zero_grad", "zeroed in place", "clipped"])
def test_what_changes_gradients_in_between_starts_the_sum_anew(how: str) -> None:
    net = model()
    opt = GradientAggregator(torch.optim.SGD(net.parameters(), lr=0.1), "agreement")
    accumulate(net, opt, [[1, 2, 0]])
    if how == "model.zero_grad":
        net.zero_grad()
    elif how == "zeroed in place":
        net.zero_grad(set_to_none=False)
    else:
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    left = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    accumulate(net, opt, [[4, 3, 5]])
    got = [p.grad for p in net.parameters()]
    opt.zero_grad()
    accumulate(net, opt, [[4, 3, 5]])
    for mine, rest, p in zip(got, left, net.parameters(), strict=True):
        assert mine is not None
        assert p.grad is not None
        torch.testing.assert_close(mine, p.grad if rest is None else rest + p.grad)


def test_nothing_is_kept_after_a_step() -> None:
    net = model()
    opt = GradientAggregator(torch.optim.SGD(net.parameters(), lr=0.1), "agreement")
    accumulate(net, opt, [[1, 2, 0]])
    assert opt._pending.touched()
    opt.step()
    assert not opt._pending.touched()


@pytest.mark.parametrize("mode", ["one-pass", "exact"])
def test_hooks_run_once_on_the_combined_gradient(mode: str) -> None:
    net = model()
    opt = GradientAggregator(torch.optim.SGD(net.parameters(), lr=0.1), "agreement", mode=mode)
    accumulate(net, opt, [[1, 2, 0]])
    plain = [p.grad for p in net.parameters()]
    opt.zero_grad()
    seen: list[Tensor] = []
    finished: list[Tensor] = []

    def double(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return 2 * grad

    weight = net.net.weight
    weight.register_hook(double)
    weight.register_post_accumulate_grad_hook(lambda p: finished.append(p.grad))
    accumulate(net, opt, [[1, 2, 0]])
    assert len(seen) == len(finished) == 1
    assert plain[0] is not None
    torch.testing.assert_close(seen[0], plain[0])
    torch.testing.assert_close(weight.grad, 2 * plain[0])
    assert finished[0] is weight.grad
    net.losses([0]).sum().backward()  # and they are still installed
    assert len(seen) == len(finished) == 2


def test_hooks_are_kept_when_the_backward_fails() -> None:
    net = model()
    seen: list[Tensor] = []
    net.net.weight.register_hook(seen.append)
    opt = GradientAggregator(torch.optim.SGD(net.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS):
        mixed = net.net(X).softmax(0).sum(1)  # over users: a leak
    with pytest.raises(Exception, match="leak"):
        opt.backward(mixed)
    net.losses([0]).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("absent", "expected"), [("renormalise", [0.25, 0.75, 0.0]), ("skip", [0.1, 0.3, 0.0])]
)
@pytest.mark.parametrize("every", [None, 1])
def test_weight_of_absent_strata(absent: str, expected: list[float], every: int | None) -> None:
    net = model()
    opt = GradientAggregator(
        torch.optim.SGD(net.parameters(), lr=0.1), Backdoor([0.1, 0.3, 0.6]),
        absent=absent, report_every=every,
    )  # fmt: skip
    accumulate(net, opt, [[1, 2]])
    assert opt.report.weights is not None
    assert opt.report.weights.tolist() == pytest.approx(expected)


def test_unknown_absent() -> None:
    with pytest.raises(ConfigError, match="renormalise"):
        GradientAggregator(torch.optim.SGD(model().parameters()), absent="drop")  # type: ignore[arg-type]
