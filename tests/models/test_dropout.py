from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pinet_fast.models.dropout import Dropout, Masks, dropout

COUNT = 400_000


def drops(rate: float, *shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return dropout(torch.ones(shape), rate) == 0


@pytest.mark.parametrize("rate", [1e-4, 0.1, 0.2, 0.5, 0.9])
def test_rate_is_within_a_binomial_bound(rate: float) -> None:
    share = drops(rate, COUNT).double().mean().item()
    assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / COUNT) + 1 / 65536


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_the_four_elements_of_a_word_are_alike_and_independent(rate: float) -> None:
    lanes = drops(rate, COUNT // 4, 4).double()
    bound = 5 / math.sqrt(COUNT // 4)
    assert (lanes.mean(0) - rate).abs().max() < bound * math.sqrt(rate * (1 - rate)) + 1 / 65536
    correlation = torch.corrcoef(lanes.t())
    assert (correlation - torch.eye(4)).abs().max() < bound
    for lag in (1, 2, 3, 4, 5, 64):
        flat = lanes.flatten()
        assert abs(torch.corrcoef(torch.stack((flat[:-lag], flat[lag:])))[0, 1]) < bound


def test_what_is_kept_is_scaled_so_that_the_mean_is_exact() -> None:
    for rate in (0.2, 1 / 3, 0.5):
        out = dropout(torch.ones(1000, dtype=torch.float64), rate)
        kept = round((1 - rate) * 65536)
        assert set(out.tolist()) == {0.0, 65536 / kept}


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (7, 5), (2, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtypes_are_kept(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    out = dropout(torch.ones(shape, dtype=dtype), 0.3)
    assert (out.shape, out.dtype) == (shape, dtype)


def test_gradient_passes_where_the_output_does() -> None:
    x = torch.randn(40, 33).t().requires_grad_()  # not contiguous
    assert not x.is_contiguous()
    out = dropout(x, 0.4)
    out.backward(torch.full_like(out, 3.0))
    kept = out != 0
    assert 0 < kept.sum() < kept.numel()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, kept * 3.0 * 65536 / round(0.6 * 65536))
    torch.testing.assert_close(out, x * x.grad / 3)


def test_stream_follows_the_seed() -> None:
    assert torch.equal(drops(0.5, 1000), drops(0.5, 1000))
    torch.manual_seed(1)
    assert not torch.equal(dropout(torch.ones(1000), 0.5) == 0, drops(0.5, 1000))


def test_module_is_that_of_torch_in_everything_else() -> None:
    module = Dropout(0.25)
    assert isinstance(module, nn.Dropout)
    x = torch.randn(10)
    assert module.eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert "p=0.25" in repr(module)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)


def test_places_have_masks_of_their_own_that_stay() -> None:
    x = torch.ones(50, 30)
    masks = Masks(x, 0.5, 3)
    dropped = [masks.drop(x, place) for place in range(3)]
    assert torch.equal(masks.drop(x, 1), dropped[1])
    assert not torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[1], dropped[2])
    half = masks.drop(x.bfloat16(), 1)  # as under autocast
    assert half.dtype is torch.bfloat16
    assert torch.equal(half.float(), dropped[1])


def test_a_part_that_is_not_in_training_drops_nothing() -> None:
    x = torch.ones(50, 30)
    masks = Masks(x, 0.5, 3)
    assert masks.where(True) is masks
    assert masks.where(False).drop(x, 1) is x
    assert masks.where(False).rate == 0.0
    assert Masks(x, 0.5, 3, training=False).drop(x, 1) is x


def test_compiled_code_drops_by_torch() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(lambda x: dropout(x, 0.5), backend=backend, fullgraph=True)
    assert compiled(torch.ones(100)).unique().tolist() == [0.0, 2.0]
    torch._dynamo.reset()
    assert any(target in (F.dropout, torch.dropout) for target in graphs[0])
