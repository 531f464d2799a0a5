from __future__ import annotations

import pytest
import torch
from stratum_gram_cases import assert_close

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, stratum_gram
from pinet_fast.kernels._library import library_refusal

op = torch.ops.pinet.stratum_gram.default


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, requires_grad):
    grads = [
        torch.randn(3, 4, 5, requires_grad=requires_grad),
        torch.randn(7, 3, dtype=torch.float64).t(),
        torch.randn(7).expand(3, 7),
    ]
    checks = torch.library.opcheck(op, (grads, backend))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_dynamic_sizes(engine):
    graphs = []
    base = torch._dynamo.lookup_backend(engine)

    def counting(graph, inputs):
        graphs.append(graph)
        return base(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def whole_model(a, b):
        return stratum_gram([a * 2, b]).sum(0)

    for columns in (5, 11, 300):
        a, b = torch.randn(3, columns, 4), torch.randn(3, columns)
        expected = stratum_gram([a * 2, b]).sum(0)
        assert torch.equal(whole_model(a, b), expected)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_give_shape_dtype_and_device():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        out = stratum_gram([torch.empty(4, 6), torch.empty(4, device="cpu")])
    assert (out.shape, out.dtype) == ((2, 4, 4), torch.float64)
    assert stratum_gram([torch.empty(4, 6, device="meta")]).device.type == "meta"


def test_result_is_detached():
    grad = torch.randn(3, 5, requires_grad=True)
    assert not stratum_gram([grad]).requires_grad
    assert not stratum_gram([grad * 2], backend="reference").requires_grad


@pytest.mark.cpp
def test_cpp_serves_by_default():
    if reason := library_refusal():
        pytest.skip(reason)
    before = _registry.num_calls("stratum_gram", "cpp")
    grads = [torch.randn(3, 5)]
    assert_close(stratum_gram(grads), grads)
    assert _registry.num_calls("stratum_gram", "cpp") == before + 1


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("PINET_FAST_BACKEND", "reference")
    before = _registry.num_calls("stratum_gram", "reference")
    stratum_gram([torch.randn(3, 5)])
    assert _registry.num_calls("stratum_gram", "reference") == before + 1


def test_forced_backend_that_cannot_serve_says_why():
    with pytest.raises(BackendUnavailableError) as error:
        stratum_gram([torch.ones(2, 3, dtype=torch.bfloat16)], backend="triton")
    message = str(error.value)
    assert "backend 'triton' cannot serve" in message
    assert "cpp: " in message
    assert "reference: can serve" in message


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([], "grads: expected at least one tensor, got none"),
        ([torch.tensor(1.0)], r"grads\[0\]: expected a shape \[S, ...\] with S >= 1, got \[\]"),
        ([torch.ones(0, 3)], r"expected a shape \[S, ...\] with S >= 1, got \[0, 3\]"),
        ([torch.ones(2, 3), torch.ones(3, 3)], r"grads\[1\]: expected 2 strata .* got 3"),
        ([torch.ones(2, 3, dtype=torch.int64)], r"expected float32, .* got torch.int64"),
        (
            [torch.ones(2, 3), torch.ones(2, 3, device="meta")],
            r"grads\[1\]: expected device cpu .* got meta",
        ),
    ],
)
def test_wrong_arguments_are_named(grads, message):
    with pytest.raises(InputError, match=f"^stratum_gram: .*{message}"):
        stratum_gram(grads)
