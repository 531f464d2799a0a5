"""Work on rows alone may be hidden from the interception; parameters may not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.one_hot import stratum_gradients
from support.oracle import TOL, autograd_stratum_gradients, relative_error
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.aggregation.sharing import rows_alone, shared
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2])
X = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()


def losses_of(layers: nn.Sequential) -> Tensor:
    h = layers[0](X)
    with rows_alone():
        h = F.gelu(h) + h.tanh()
        h = (h - h.mean(1, keepdim=True)) * 2
    out: Tensor = layers[1](h)
    with rows_alone():
        return out.sin().sum(1)


def test_the_strata_are_right() -> None:
    layers = model()
    parameters = list(layers.parameters())

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            losses = losses_of(layers)
        opt.backward(losses)

    found = stratum_gradients(parameters, 3, run)
    expected = autograd_stratum_gradients(lambda: losses_of(layers), IDS, parameters, 3)
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < TOL[torch.float64]


def test_no_mode_sees_what_is_inside() -> None:
    with Watching() as mode:
        losses_of(model())
    assert mode.seen["linear"] == 2
    assert not {"gelu", "tanh", "mean", "sin", "sum"} & set(mode.seen)


def test_a_parameter_inside_is_refused_by_name() -> None:
    layers = model()
    opt = GradientAggregator(torch.optim.SGD(layers.named_parameters(), lr=0.1), "agreement")
    with opt.stratify(IDS):
        h = layers[0](X)
        with rows_alone():
            losses = layers[1](h).sum(1)
    with pytest.raises(AggregationError, match=r"1\.weight.*got gradient outside every boundary"):
        opt.backward(losses)


def test_inside_shared_work_all_is_seen() -> None:
    with Watching() as mode, shared(), rows_alone():
        torch.tanh(X)
    assert mode.seen["tanh"] == 1


def test_shared_work_that_failed_hides_no_less() -> None:
    with pytest.raises(ValueError, match="no"), shared(), rows_alone():
        raise ValueError("no")
    with Watching() as mode, rows_alone():
        torch.tanh(X)
    assert mode.seen["tanh"] == 0


def test_what_follows_an_error_inside_is_seen() -> None:
    with Watching() as mode:
        with pytest.raises(ValueError, match="no"), rows_alone():
            raise ValueError("no")
        torch.tanh(X)
    assert mode.seen["tanh"] == 1


def test_compilers_pass_through_it() -> None:
    layers = model()
    compiled = torch.compile(lambda: losses_of(layers), backend="eager", fullgraph=True)
    assert torch.equal(compiled(), losses_of(layers))
