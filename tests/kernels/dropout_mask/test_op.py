from __future__ import annotations

import pytest
import torch

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, dropout_mask
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.dropout_mask import cost

op = torch.ops.pinet.dropout_mask.default
LIKE = torch.empty(5, 7)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, requires_grad):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        like = torch.empty(4, 5, dtype=dtype).requires_grad_(requires_grad)
        checks = torch.library.opcheck(op, (like, 0.5, 3, 11, backend))
        assert set(checks.values()) == {"SUCCESS"}


def test_compiles_into_one_graph_with_dynamic_sizes():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def dropped(x):
        return x * dropout_mask(x, 0.4, seed=9)[0]

    for count in (5, 11, 300):
        x = torch.randn(count, 6)
        assert torch.equal(dropped(x), x * dropout_mask(x, 0.4, seed=9)[0])
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_give_shape_and_dtype():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        out = dropout_mask(torch.empty(4, 6, dtype=torch.float16), 0.5, count=2, seed=0)
    assert (out.shape, out.dtype) == ((2, 4, 6), torch.float16)


def test_the_seed_is_drawn_from_torchs_generator():
    torch.manual_seed(0)
    first, second = dropout_mask(LIKE, 0.5), dropout_mask(LIKE, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropout_mask(LIKE, 0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    dropout_mask(LIKE, 0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_result_is_detached():
    like = torch.randn(4, 5, requires_grad=True)
    assert not dropout_mask(like * 2, 0.5).requires_grad


@pytest.mark.cpp
def test_cpp_serves_by_default():
    if reason := library_refusal():
        pytest.skip(reason)
    before = _registry.num_calls("dropout_mask", "cpp")
    dropout_mask(LIKE, 0.5)
    assert _registry.num_calls("dropout_mask", "cpp") == before + 1


def test_forced_backend_that_cannot_serve_says_why():
    with pytest.raises(BackendUnavailableError, match=r"(?s)cpp: .*reference: can serve"):
        dropout_mask(LIKE.bfloat16(), 0.5, backend="cpp")


def test_cost_writes_each_element_once():
    assert cost(6400, itemsize=4) == (14400, 25600)


@pytest.mark.parametrize(
    ("like", "arguments", "message"),
    [
        (LIKE.int(), {"rate": 0.5}, "like: expected float32, .* got torch.int32"),
        (LIKE, {"rate": 0.0}, "rate: expected 0 < rate < 1, got 0.0"),
        (LIKE, {"rate": 1.0}, "rate: expected 0 < rate < 1, got 1.0"),
        (LIKE, {"rate": float("nan")}, "rate: expected 0 < rate < 1, got nan"),
        (LIKE, {"rate": 0.5, "count": 0}, "count: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(like, arguments, message):
    with pytest.raises(InputError, match=f"^dropout_mask: {message}"):
        dropout_mask(like, **arguments)
