"""Calls at boundaries that are refused: each message has a fix, and the fix is exact."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast import GradientAggregator, StrataIndex
from pinet_fast.aggregation import envelope
from pinet_fast.errors import AggregationError, BoundaryError, RowLayoutError, StrataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

B, D, S = 7, 4, 3
STRATA = torch.tensor([0, 1, 1, 2, 0, 2, 1])

Call = "Callable[[Tensor, Tensor], Tensor]"  # of a parameter [D, D], and rows [B, D]
EXACT = 'mode="exact"'


def row_like(p: Tensor) -> Tensor:
    """Values of a parameter that could be one a user: [B]."""
    return p.flatten()[:B] * 1


# name -> (refused call, what the message says of it, the call that it proposes, or EXACT)
CASES: dict[str, tuple[Call, str, Call | str]] = {
    "linear of a parameter": (
        lambda p, x: F.linear(p, x).T,
        r"linear: .* got p \[4, 4\], a tensor \[7, 4\].*F\.linear\(rows, parameter\)\.T",
        lambda p, x: F.linear(x, p),
    ),
    "layer_norm of a parameter": (
        lambda p, x: F.layer_norm(row_like(p), (B,), x[:, 0]),
        r"layer_norm: .* got p \[7\].*shared\(\).*mode=\"exact\"",
        EXACT,
    ),
    "rms_norm of a parameter": (
        lambda p, x: F.rms_norm(row_like(p), (B,), x[:, 0]),
        r"rms_norm: .* got p \[7\], a tensor \[7\]; .*mode=\"exact\"",
        EXACT,
    ),
    "prelu of a parameter": (
        lambda p, x: F.prelu(p.flatten()[:B].expand(2, B), x[:, 0]).sum(0),
        r"prelu: .* got p \[2, 7\], a tensor \[7\]; .*mode=\"exact\"",
        EXACT,
    ),
    "in place on a parameter": (
        lambda p, x: row_like(p).mul_(x[:, 0]),
        r"mul_: works in place on a parameter; use the form that returns a new",
        EXACT,
    ),
    "in place, too small": (
        lambda p, x: x[:, :1].clone().add_(p[0]),
        r"add_: the result \[7, 4\] does not fit into \[7, 1\]; use .* Tensor\.add",
        lambda p, x: x[:, :1].add(p[0]),
    ),
    "an argument that no rule knows": (
        lambda p, x: torch.add(x, p[0], out=torch.empty_like(x)),
        r"arguments \(Tensor, Tensor, out=\) are not supported .*'out'.*mode=\"exact\"",
        lambda p, x: torch.add(x, p[0]),
    ),
    "weights of a bag": (
        lambda p, x: F.embedding_bag(
            torch.arange(2 * B).view(B, 2) % D,
            p,
            per_sample_weights=p.flatten()[:14].view(B, 2),
            mode="sum",
        ),
        r"embedding_bag: expected a parameter as the table.*F\.embedding and multiply",
        lambda p, x: (
            F.embedding(torch.arange(2 * B).view(B, 2) % D, p) * x[:, :2].unsqueeze(-1)
        ).sum(1),
    ),
    "rows behind others in a function without a rule": (
        lambda p, x: (
            torch.addcmul(time_first := (x @ p).expand(2, B, D).reshape(2 * B, D), time_first, p[0])
            .view(2, B, D)
            .sum(0)
        ),
        r"addcmul: has no boundary rule.*users in dimension 0 behind 2.*bring them to one layout",
        lambda p, x: torch.addcmul(x @ p, x @ p, p[0]),
    ),
}


def losses_of(values: Tensor) -> Tensor:
    return values.square() if values.dim() == 1 else values.square().flatten(1).sum(1)


def aggregate(
    p: Tensor, call: Callable[[Tensor, Tensor], Tensor], rule: object, **options: Any
) -> None:
    sgd = torch.optim.SGD([("p", p)], lr=0.1)
    opt = GradientAggregator(sgd, rule, num_strata=S, **options)  # type: ignore[arg-type]
    x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with opt.stratify(STRATA):
        losses = losses_of(call(p, x))
    opt.backward(losses)


@pytest.mark.parametrize("name", CASES)
def test_a_refused_call_and_its_fix(name: str) -> None:
    refused, message, fix = CASES[name]
    p = nn.Parameter(torch.randn(D, D, dtype=torch.float64))
    with pytest.raises(BoundaryError) as raised:
        aggregate(p, refused, "agreement")
    text = str(raised.value) + "\n".join(getattr(raised.value, "__notes__", []))
    assert re.search(message, text), text
    options = {"mode": "exact"} if fix is EXACT else {}
    call = refused if fix is EXACT else fix
    x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (want,) = autograd_stratum_gradients(lambda: losses_of(call(p, x)), STRATA, [p], S)
    for s in range(S):
        p.grad = None
        aggregate(p, call, lambda gram, s=s: torch.eye(S, dtype=gram.dtype)[s], **options)
        torch.testing.assert_close(p.grad, want[s], rtol=1e-10, atol=1e-13)


def test_a_scalar_of_a_forward_that_has_ended() -> None:
    model = nn.Linear(D, 1)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement", num_strata=S)
    with opt.stratify(STRATA, reduction="mean"):
        loss = model(torch.randn(B, D)).square().mean()
    opt.zero_grad()
    with pytest.raises(AggregationError, match=r"this scalar belongs to a forward .* before them"):
        loss.backward()


def test_shared_rows_and_a_scalar_need_their_graph_once_more() -> None:
    model, pool = nn.Linear(D, D).double(), nn.Linear(D, D).double()
    parameters = [*model.parameters(), *pool.parameters()]
    x = torch.randn(B, D, dtype=torch.float64)

    def losses(shared: Callable[[], AbstractContextManager[object]]) -> Tensor:
        users = model(x)
        with shared():
            items = pool(x + users.tanh())
        return (users @ items.T).square().mean(1)

    want = autograd_stratum_gradients(lambda: losses(nullcontext), STRATA, parameters, S)
    for s in range(S):
        opt = GradientAggregator(
            torch.optim.SGD(parameters, lr=0.1),
            lambda gram, s=s: torch.eye(S, dtype=gram.dtype)[s],
            num_strata=S,
        )
        for retain in (False, True):
            opt.zero_grad()
            with opt.stratify(STRATA, reduction="mean"):
                loss = losses(opt.shared).mean()
            if retain:
                loss.backward(retain_graph=True)
            else:
                with pytest.raises(AggregationError, match=r"loss\.backward\(retain_graph=True\)"):
                    loss.backward()
        for p, expected in zip(parameters, want, strict=True):
            torch.testing.assert_close(p.grad, expected[s], rtol=1e-10, atol=1e-13)


def test_rows_that_may_be_of_users_or_of_events() -> None:
    model = nn.Linear(D, 1)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement", num_strata=S)
    with (
        pytest.raises(RowLayoutError, match=r"8 rows may be 4 for each of the users or 2 for each"),
        opt.stratify([0, 1], lengths=[1, 3]),
    ):
        model(torch.randn(8, D))


def test_a_frame_that_torch_compile_is_about_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    monkeypatch.setattr(envelope, "frame_callback", lambda: lambda: object())
    opt = GradientAggregator(torch.optim.SGD(nn.Linear(D, 1).parameters(), lr=0.1), "agreement")
    with pytest.raises(AggregationError, match=r"torch\.compile traces"), opt.stratify(STRATA):
        pass


INDICES = {
    "ids": (lambda: StrataIndex(STRATA.view(1, -1), S), r"int64 \[B\]; got shape \[1, 7\]; pass"),
    "num_strata": (lambda: StrataIndex(STRATA, 0), "at least 1, got 0"),
    "lengths": (
        lambda: StrataIndex(STRATA, S, [1, 2]),
        r"one length a user, \[7\]; got \[2\]; pass",
    ),
    "negative": (lambda: StrataIndex(STRATA, S, [-1] * B), ">= 0, got -1; pass"),
    "counts": (
        lambda: StrataIndex(STRATA, S, user_counts=[1, 2]),
        r"user_counts: expected 3 numbers >= 0, one a stratum; got \[1, 2\]",
    ),
    "lengths twice": (
        lambda: (
            GradientAggregator(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
            .stratify(StrataIndex(STRATA, S), lengths=[1] * B)
            .__enter__()
        ),
        "a StrataIndex carries its lengths; drop lengths=",
    ),
}


@pytest.mark.parametrize("name", INDICES)
def test_strata_that_do_not_fit(name: str) -> None:
    make, message = INDICES[name]
    with pytest.raises(StrataError, match=message):
        make()


@pytest.mark.parametrize("weights", [torch.ones(B - 1), -torch.ones(B)])
def test_weights_that_do_not_fit_the_losses(weights: Tensor) -> None:
    model = nn.Linear(D, 1)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement", num_strata=S)
    with opt.stratify(STRATA):
        losses = model(torch.randn(B, D)).square().squeeze(1)
    with pytest.raises(AggregationError, match=r"weights must be >= 0"):
        opt.backward(losses, weights)
