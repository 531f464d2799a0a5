"""Outside the envelope: an error that says what, where, expected, got and a fix; never silence."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from grid.contract import (
    IDS,
    S,
    X,
    assert_still_usable,
    losses_of,
    network,
    one_hot,
    stratum_gradients,
)
from pinet_fast import GradientAggregator
from pinet_fast.errors import ConfigError, InputError, PinetError
from pinet_fast.rules import Backdoor

if TYPE_CHECKING:
    from collections.abc import Iterator


class Scale(torch.autograd.Function):
    """Holds a parameter where no torch function takes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


def finish(opt: GradientAggregator, losses: Tensor) -> None:
    opt.backward(losses)
    opt.step()


def autograd_function(opt: GradientAggregator, model: nn.Sequential) -> None:
    with opt.stratify(IDS):
        losses = Scale.apply(torch.tanh(model(X)), model[2].bias).pow(2).sum(1)
    finish(opt, losses)


def only_autograd_function(opt: GradientAggregator, model: nn.Sequential) -> None:
    with opt.stratify(IDS):
        losses = Scale.apply(X[:, :2], model[2].bias).pow(2).sum(1)
    finish(opt, losses)


def script_module(opt: GradientAggregator, model: nn.Sequential) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        scripted = torch.jit.script(model[0])
    with opt.stratify(IDS):
        losses = model[2](scripted(X)).pow(2).sum(1)
    finish(opt, losses)


def functional_call_with_others(opt: GradientAggregator, model: nn.Sequential) -> None:
    others = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    with opt.stratify(IDS):
        losses = torch.func.functional_call(model, others, (X,)).pow(2).sum(1)
    finish(opt, losses)


def functional_call_with_earlier(opt: GradientAggregator, model: nn.Sequential) -> None:
    earlier = {n: p * 1.0 for n, p in model.named_parameters()}
    with opt.stratify(IDS):
        losses = torch.func.functional_call(model, earlier, (X,)).pow(2).sum(1)
    finish(opt, losses + losses_of(model) * 0)


def vmap(opt: GradientAggregator, model: nn.Sequential) -> None:
    with opt.stratify(IDS):
        losses = torch.func.vmap(lambda row: model(row).pow(2).sum())(X)
    finish(opt, losses)


def double_backward(opt: GradientAggregator, model: nn.Sequential) -> None:
    x = X.clone().requires_grad_()
    with opt.stratify(IDS):
        losses = losses_of(model, x)
        slope = torch.autograd.grad(losses.sum(), x, create_graph=True)[0]
        losses = losses + slope.pow(2).sum(1)
    finish(opt, losses)


def threads(opt: GradientAggregator, model: nn.Sequential) -> None:
    """What DataParallel does on several devices: replicas run in threads of their own."""
    with opt.stratify(IDS), ThreadPoolExecutor(2) as pool:
        halves = pool.map(model, (X[:4], X[4:]))
        losses = torch.cat(list(halves)).pow(2).sum(1)
    finish(opt, losses)


class Broadcast(torch.autograd.Function):
    """Copies of parameters for a replica, as DataParallel makes them."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.clone() for p in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grads


def data_parallel(opt: GradientAggregator, model: nn.Sequential) -> None:
    """The parts of nn.DataParallel, which needs two devices: broadcast, replicas in threads."""
    names = [n for n, _ in model.named_parameters()]

    def replica(x: Tensor) -> Tensor:
        copies = dict(zip(names, Broadcast.apply(*model.parameters()), strict=True))
        module = copy.deepcopy(model)  # each thread swaps the tensors of its own
        return torch.func.functional_call(module, copies, (x,))  # type: ignore[no-any-return]

    with opt.stratify(IDS), ThreadPoolExecutor(2) as pool:
        losses = torch.cat(list(pool.map(replica, (X[:4], X[4:])))).pow(2).sum(1)
    finish(opt, losses)


def graph_capture(opt: GradientAggregator, model: nn.Sequential) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with opt.stratify(IDS):
            losses = losses_of(model)
        finish(opt, losses)


def packed_sequence(opt: GradientAggregator, model: nn.Sequential) -> None:
    gru = nn.GRU(4, 4, batch_first=True).double()
    opt.add_param_group({"params": list(gru.named_parameters())})
    x = torch.randn(7, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([5, 4, 4, 3, 2, 1, 1])
    with opt.stratify(IDS):
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        losses = model[2](gru(packed)[1][0]).pow(2).sum(1)
    finish(opt, losses)


def reentrant(opt: GradientAggregator, model: nn.Sequential) -> None:
    x = X.clone().requires_grad_()
    with opt.stratify(IDS):
        hidden = checkpoint(model[:2], x, use_reentrant=True)
        losses = model[2](hidden).pow(2).sum(1)
    finish(opt, losses)


def nested(opt: GradientAggregator, model: nn.Sequential) -> None:
    with opt.stratify(IDS):
        losses_of(model)
        with opt.stratify(IDS):
            losses_of(model)


def in_place(opt: GradientAggregator, model: nn.Sequential) -> None:
    with opt.stratify(IDS):
        model[2].bias.mul_(model(X))


def closure(opt: GradientAggregator, model: nn.Sequential) -> None:
    with opt.stratify(IDS):
        losses = losses_of(model)
    opt.backward(losses)
    opt.step(lambda: 0.0)  # type: ignore[arg-type, return-value]


@dataclass(frozen=True)
class Refusal:
    """An attempt, and what its message must contain: the thing, the place, a way out."""

    attempt: Any
    says: tuple[str, ...]


REFUSALS = {
    "autograd.Function": Refusal(
        autograd_function, (r"2\.bias", r"autograd\.Function|outside every boundary")
    ),
    "autograd.Function alone": Refusal(
        only_autograd_function, (r"2\.bias|no parameter of the optimizer",)
    ),
    "ScriptModule": Refusal(
        script_module, (r"0\.weight|0\.bias", r"ScriptModule|outside every boundary")
    ),
    "functional_call, other tensors": Refusal(
        functional_call_with_others, ("functional_call|no parameter of the optimizer",)
    ),
    "functional_call, tensors made before": Refusal(
        functional_call_with_earlier, (r"0\.weight", "functional_call|outside every boundary")
    ),
    "vmap": Refusal(vmap, ("vmap",)),
    "double backward": Refusal(double_backward, (r"double backward|create_graph|twice",)),
    "threads": Refusal(threads, (r"0\.weight|no parameter of the optimizer",)),
    "DataParallel": Refusal(data_parallel, (r"0\.weight|no parameter of the optimizer",)),
    "CUDA graph capture": Refusal(graph_capture, ("captur", "warm")),
    "PackedSequence": Refusal(packed_sequence, ("PackedSequence", "ragged|pad")),
    "reentrant checkpointing": Refusal(reentrant, ("reentrant", "use_reentrant=False")),
    "nested stratify": Refusal(nested, ("stratify", "nest")),
    "in place": Refusal(in_place, ("in place", r"2\.bias")),
    "closure": Refusal(closure, ("closure", "stratify")),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name_and_usable_afterwards(name: str) -> None:
    model = network()
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = GradientAggregator(sgd, "agreement", num_strata=S)
    before = [p.detach().clone() for p in model.parameters()]
    case = REFUSALS[name]
    with pytest.raises(PinetError) as raised:
        case.attempt(opt, model)
    for pattern in case.says:
        raised.match(f"(?is){pattern}")
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)  # no step was taken
    assert_still_usable_with_groups(opt, model)


def assert_still_usable_with_groups(opt: GradientAggregator, model: nn.Sequential) -> None:
    """As ``assert_still_usable``; groups that the attempt added take no part."""
    if len(opt.param_groups) == 1:
        assert_still_usable(opt, model)
        return
    opt.zero_grad()
    with opt.stratify(IDS):
        losses = losses_of(model)
    opt.backward(losses)
    opt.step()
    assert opt.report.mode == "one-pass"


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, while it traces what it cannot compile
def test_a_compiled_step_is_refused_or_exact() -> None:
    """Dynamo may fall back to eager code around the ``with``; then the step must be right."""
    torch._dynamo.reset()
    model = network()
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = GradientAggregator(sgd, Backdoor(one_hot(1)), num_strata=S, report_every=1)
    expected = stratum_gradients(model)

    @torch.compile(backend="eager")
    def step(x: Tensor) -> None:
        with opt.stratify(IDS):
            losses = model(x).pow(2).sum(1)
        opt.backward(losses)

    try:
        step(X)
    except PinetError as error:
        assert "compile" in str(error)  # noqa: PT017  (either outcome will do)
    else:
        for p, g in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g[1], rtol=1e-10, atol=1e-13)
    torch._dynamo.reset()
    assert_still_usable(opt, model)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one, without a network."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_dtensor_parameters_are_refused_where_stratum_gradients_are_needed() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))

    def attempt() -> None:
        opt = GradientAggregator(torch.optim.SGD(model.named_parameters(), lr=0.1), "agreement")
        with opt.stratify(IDS, num_strata=S):
            pass

    with pytest.raises(PinetError, match=r"(?s)(weight.*DTensor|DTensor.*weight)"):
        attempt()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "fast"}, r"mode.*one-pass.*exact.*fast"),
        ({"check": "sometimes"}, r"check.*first.*never.*always|check.*sometimes"),
        ({"absent": "drop"}, r"absent.*renormalise.*skip.*drop"),
        ({"leaks": "ignore"}, r"leaks.*error.*attribute-by-row.*ignore"),
        ({"rule": "agrement"}, r"agreement.*agrement"),
        ({"report_every": 0}, r"report_every.*0"),
        ({"num_strata": 0}, r"num_strata.*0"),
    ],
)
def test_wrong_options_name_the_right_ones(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=f"(?s){match}"):
        GradientAggregator(torch.optim.SGD(network().parameters(), lr=0.1), **options)


@pytest.mark.parametrize("bad", [[], [3], [torch.optim.SGD(nn.Linear(1, 1).parameters()), 3]])
def test_lists_hold_optimizers(bad: Any) -> None:
    with pytest.raises(ConfigError, match="optimizer"):
        GradientAggregator(bad)


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    model = network()
    pair = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(ConfigError, match=r"(?s)optimizer.*(two|twice|more than one|both)"):
        GradientAggregator(pair)  # type: ignore[arg-type]


def test_plain_gradients_under_a_list_warn_once() -> None:
    model = network()
    parts = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]
    opt = GradientAggregator(parts)  # type: ignore[arg-type]
    losses_of(model).mean().backward()
    with pytest.warns(UserWarning, match="plain step"):
        opt.step()
    assert opt.report.mode == "plain"
