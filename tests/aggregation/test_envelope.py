"""What stratum gradients cannot do: each an error that names it, never silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.errors import AggregationError, BoundaryError

IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2])
B, H, D, S = 7, 3, 4, 3


def test_vmap_is_refused_by_name() -> None:
    model = nn.Linear(D, 1)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with pytest.raises(BoundaryError, match="vmap"), opt.stratify(IDS):
        torch.vmap(lambda row: F.linear(row, model.weight, model.bias))(torch.randn(B, D))


def test_functional_call_with_other_tensors_is_refused() -> None:
    model = nn.Linear(D, 1)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS):
        losses = torch.func.functional_call(model, others, torch.randn(B, D)).square().squeeze(1)
    with pytest.raises(AggregationError, match="no parameter of the optimizer met a row"):
        opt.backward(losses)


def test_functional_call_with_tensors_computed_of_parameters_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Linear(D, 1).double()
    x = torch.randn(B, D, dtype=torch.float64)
    parameters = list(model.parameters())

    def losses() -> Tensor:
        half = {name: p / 2 for name, p in model.named_parameters()}
        return torch.func.functional_call(model, half, x).square().squeeze(1)

    expected = autograd_stratum_gradients(losses, IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            values = losses()
        opt.backward(values)

    for got, theirs in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["one-pass", "exact"])
def test_a_complex_parameter_is_refused_by_name(mode: Any) -> None:
    model = nn.Linear(D, 1, dtype=torch.complex64)
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = GradientAggregator(sgd, "agreement", mode=mode)
    expected = r"weight is complex64.*nn\.Parameter\(torch\.view_as_real\(p\)\)"
    with pytest.raises(AggregationError, match=expected), opt.stratify(IDS):
        pass
    opt = GradientAggregator(sgd, "joint")
    with opt.stratify(IDS):
        losses = model(torch.randn(B, D, dtype=torch.complex64)).abs().squeeze(1)
    opt.backward(losses)
    assert model.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_script_module_is_named() -> None:
    plain, scripted = nn.Linear(D, D), torch.jit.script(nn.Linear(D, 1))
    opt = GradientAggregator(
        torch.optim.SGD([*plain.parameters(), *scripted.parameters()], lr=0.1), "agreement"
    )
    with opt.stratify(IDS):
        losses = scripted(plain(torch.randn(B, D))).square().squeeze(1)
    with pytest.raises(AggregationError, match=r"parameter 2 .*ScriptModule"):
        opt.backward(losses)
    assert all(p.grad is None for p in [*plain.parameters(), *scripted.parameters()])


def test_packed_sequences_are_refused_by_name() -> None:
    model = nn.GRU(D, 3, batch_first=True)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(B, 5, D), torch.tensor([5, 4, 4, 3, 2, 2, 1]), batch_first=True
    )
    with pytest.raises(BoundaryError, match="PackedSequence"), opt.stratify(IDS):
        model(packed)


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.tensor as sharded

    class Sharded(nn.Parameter):
        pass

    model = nn.Linear(D, 1)
    model.weight = Sharded(model.weight.detach())
    monkeypatch.setattr(sharded, "DTensor", Sharded)  # as if the weight were such
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with pytest.raises(AggregationError, match="DTensor"), opt.stratify(IDS):
        pass
    GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "backdoor").zero_grad()


def test_graph_capture_is_refused_while_the_check_is_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = nn.Linear(D, 1)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with pytest.raises(AggregationError, match="CUDA graph"), opt.stratify(IDS):
        pass


def test_a_compiled_step_is_refused_by_name() -> None:
    model = nn.Linear(D, 1)
    x = torch.randn(B, D)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")

    @torch.compile(backend="eager")
    def step() -> None:
        with opt.stratify(IDS):
            losses = model(x).square().squeeze(1)
        opt.backward(losses)

    with pytest.raises(AggregationError, match=r"torch\.compile traces the training step itself"):
        step()
