from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from routed_linear_cases import assert_close

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, routed_linear
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.routed_linear import cost

op = torch.ops.pinet.routed_linear.default
IDS = torch.tensor([0, 2, 2, 1])
OFFSETS = (0, 1, 2, 4)
ORDER = torch.tensor([0, 3, 1, 2])
PRECISIONS = ("ieee", "tf32", "tf32x3")
ROWS, WEIGHT, BIAS = torch.randn(4, 3), torch.randn(3, 5, 3), torch.randn(3, 5)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, requires_grad):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = [t.to(dtype).clone().requires_grad_(requires_grad) for t in (ROWS, WEIGHT, BIAS)]
        for routes in ((IDS, OFFSETS, ORDER), (IDS.sort().values, OFFSETS, None)):
            checks = torch.library.opcheck(op, (*tensors, *routes, backend))
            assert set(checks.values()) == {"SUCCESS"}
        checks = torch.library.opcheck(op, (*tensors[:2], None, IDS, OFFSETS, ORDER, backend))
        assert set(checks.values()) == {"SUCCESS"}
    for precision in PRECISIONS:
        checks = torch.library.opcheck(op, (*tensors, IDS, OFFSETS, ORDER, backend, precision))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("precision", [(), *((precision,) for precision in PRECISIONS)])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
def test_opcheck_of_the_backward(needs, precision):
    arguments = (torch.randn(4, 5), ROWS, WEIGHT, IDS, OFFSETS, ORDER, *needs, "", *precision)
    checks = torch.library.opcheck(torch.ops.pinet.routed_linear_backward.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("engine", [None, "aot_eager"])
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_backward_has_the_precision_of_the_forward(precision, engine, monkeypatch):
    seen = []
    for name, num_arguments in (("routed_linear", 7), ("routed_linear_backward", 9)):
        reference = _registry.backends(name)[-1]

        def watched(*arguments, name=name, count=num_arguments, impl=reference.impl):
            seen.append((name, *arguments[count:]))
            impl(*arguments)

        monkeypatch.setitem(_registry._ops, name, (replace(reference, impl=watched),))
    rows = ROWS.clone().requires_grad_()
    asked = {} if precision is None else {"precision": precision}

    def forward(rows):
        return routed_linear(rows, WEIGHT, BIAS, IDS, OFFSETS, ORDER, **asked)

    if engine is not None:
        forward = torch.compile(forward, fullgraph=True, backend=engine)
    forward(rows).sum().backward()
    torch._dynamo.reset()
    expected = precision or "ieee"
    assert seen == [("routed_linear", expected), ("routed_linear_backward", expected)]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_backends_without_the_choice_ignore_the_precision(backend, precision):
    if backend == "cpp" and (reason := library_refusal()):
        pytest.skip(reason)
    inputs = [t.clone().requires_grad_() for t in (ROWS, WEIGHT, BIAS)]
    results = []
    for options in ({}, {"precision": precision}):
        out = routed_linear(*inputs, IDS, OFFSETS, ORDER, backend=backend, **options)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
@pytest.mark.parametrize("order", [ORDER, None])
def test_gradients_are_those_of_finite_differences(backend, order):
    if backend == "cpp" and (reason := library_refusal()):
        pytest.skip(reason)
    ids = IDS if order is not None else IDS.sort().values
    inputs = [t.double().requires_grad_() for t in (ROWS, WEIGHT, BIAS)]
    assert torch.autograd.gradcheck(
        lambda *t: routed_linear(*t, ids, OFFSETS, order, backend=backend), inputs
    )
    assert torch.autograd.gradcheck(
        lambda *t: routed_linear(*t, None, ids, OFFSETS, order, backend=backend), inputs[:2]
    )


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_is_needed_is_computed(wanted, monkeypatch):
    seen = []
    impl = _registry.select("routed_linear_backward", (BIAS[0], ROWS, *[None] * 4)).impl
    (serving, *_) = [b for b in _registry.backends("routed_linear_backward") if b.probe() is None]

    def watched(*arguments):
        seen.append([x is not None for x in arguments[6:9]])
        impl(*arguments)

    monkeypatch.setitem(
        _registry._ops,
        "routed_linear_backward",
        (type(serving)("watched", 99, lambda: None, lambda *_: None, watched),),
    )
    inputs = [t.clone() for t in (ROWS, WEIGHT, BIAS)]
    inputs[wanted].requires_grad_()
    routed_linear(*inputs, IDS, OFFSETS, ORDER).sum().backward()
    assert seen == [[i == wanted for i in range(3)]]
    assert inputs[wanted].grad is not None


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_dynamic_sizes(engine):
    graphs = []
    base = torch._dynamo.lookup_backend(engine)

    def counting(graph, inputs):
        graphs.append(graph)
        return base(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def doubled(rows, weight, bias, ids, offsets):
        return routed_linear(rows * 2, weight, bias, ids, offsets)

    weight, bias = WEIGHT.clone().requires_grad_(), BIAS.clone().requires_grad_()
    for counts in ((5, 7, 3), (11, 2, 9), (100, 50, 30)):
        offsets = [0, counts[0], counts[0] + counts[1], sum(counts)]
        ids = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        rows, grad = torch.randn(sum(counts), 3), torch.randn(sum(counts), 5)
        out = doubled(rows, weight, bias, ids, offsets)
        expected = routed_linear(rows * 2, weight, bias, ids, offsets)
        assert torch.equal(out, expected)
        mine = torch.autograd.grad(out, (weight, bias), grad)
        theirs = torch.autograd.grad(expected, (weight, bias), grad)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_give_shapes_and_dtypes():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        ids = torch.empty(4, dtype=torch.int64)
        rows, weight = torch.empty(4, 3).half(), torch.empty(3, 5, 3).half()
        out = routed_linear(rows, weight, None, ids, OFFSETS)
    assert out.shape == (4, 5)
    assert out.dtype is torch.float16


def test_a_gradient_of_a_gradient_is_refused():
    rows = ROWS.clone().requires_grad_()
    out = routed_linear(rows, WEIGHT, BIAS, IDS, OFFSETS, ORDER)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of a gradient is not implemented"):
        grad.sum().backward()


@pytest.mark.cpp
def test_cpp_serves_by_default():
    if reason := library_refusal():
        pytest.skip(reason)
    names = ("routed_linear", "routed_linear_backward")
    before = [_registry.num_calls(name, "cpp") for name in names]
    weight = WEIGHT.clone().requires_grad_()
    out = routed_linear(ROWS, weight, BIAS, IDS, OFFSETS, ORDER)
    assert_close(out.detach(), ROWS, WEIGHT, BIAS, IDS)
    out.sum().backward()
    assert [_registry.num_calls(name, "cpp") for name in names] == [n + 1 for n in before]


def test_forced_backend_that_cannot_serve_says_why():
    half = [t.bfloat16() for t in (ROWS, WEIGHT, BIAS)]
    with pytest.raises(BackendUnavailableError, match=r"(?s)cpp: .*reference: can serve"):
        routed_linear(*half, IDS, OFFSETS, ORDER, backend="cpp")


def test_cost_is_that_of_one_layer():
    flop, num_bytes = cost(6400, 64, 32, 4, itemsize=4)
    assert flop == 2 * 6400 * 64 * 32 + 6400 * 64
    assert num_bytes == 4 * (6400 * 96 + 4 * 64 * 33)
    assert cost(6400, 64, 32, 8, 4)[0] == flop


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ROWS[0]}, r"rows: expected \[N, D_in\], .* got \[3\]"),
        ({"rows": ROWS.long()}, "rows: expected .* got .* torch.int64"),
        ({"weight": WEIGHT[0]}, r"weight: expected \[H, D_out, 3\] torch.float32, .* got \[5, 3\]"),
        ({"weight": WEIGHT.double()}, "weight: expected .* got .* torch.float64"),
        ({"bias": BIAS[:2]}, r"bias: expected \[3, 5\] torch.float32, .* got \[2, 5\]"),
        ({"ids": IDS[:3]}, r"ids: expected int64 \[4\], .* got torch.int64 \[3\]"),
        ({"ids": IDS.int()}, "ids: .* got torch.int32"),
        ({"order": ORDER.int()}, "order: .* got torch.int32"),
        ({"ids": IDS.to("meta")}, "ids: expected on cpu, as rows, got meta"),
        ({"row_offsets": (0, 3, 2, 4)}, r"row_offsets: .* got \[0, 3, 2, 4\]"),
        ({"row_offsets": (0, 4)}, "row_offsets: expected 4 ascending numbers from 0 to 4"),
        ({"row_offsets": ()}, "row_offsets: .*; count rows by head"),
        (
            {"precision": "tf16"},
            "routed_linear: precision: expected one of ieee, tf32, tf32x3, got "
            "'tf16'; leave it out for ieee",
        ),
    ],
)
def test_bad_input_says_what_was_expected(change, message):
    arguments = {
        "rows": ROWS, "weight": WEIGHT, "bias": BIAS, "ids": IDS, "row_offsets": OFFSETS,
        "order": ORDER,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        routed_linear(**(arguments | change))
