from __future__ import annotations

import pytest
import torch
from stratified_linear_cases import assert_close

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, stratified_linear_backward
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.stratified_linear import cost

op = torch.ops.pinet.stratified_linear_backward.default
IDS = torch.tensor([0, 2, 2, 1])
OFFSETS = (0, 1, 2, 4)
ORDER = torch.tensor([0, 3, 1, 2])
GRAD, ROWS, WEIGHT = torch.randn(4, 5), torch.randn(4, 3), torch.randn(5, 3)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, requires_grad):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = [t.to(dtype).clone().requires_grad_(requires_grad) for t in (GRAD, ROWS, WEIGHT)]
        for needs in ((True, True, True), (False, True, False)):
            arguments = (*tensors, IDS, OFFSETS, ORDER, *needs, backend)
            checks = torch.library.opcheck(op, arguments)
            assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_dynamic_sizes(engine):
    graphs = []
    base = torch._dynamo.lookup_backend(engine)

    def counting(graph, inputs):
        graphs.append(graph)
        return base(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def doubled(grad, rows, weight, ids, offsets):
        return stratified_linear_backward(grad * 2, rows, weight, ids, offsets)

    for counts in ((5, 7, 3), (11, 2, 9), (100, 50, 30)):
        offsets = [0, counts[0], counts[0] + counts[1], sum(counts)]
        ids = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        grad, rows = torch.randn(sum(counts), 5), torch.randn(sum(counts), 3)
        outs = doubled(grad, rows, WEIGHT, ids, offsets)
        expected = stratified_linear_backward(grad * 2, rows, WEIGHT, ids, offsets)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_give_shapes_and_dtypes():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        ids = torch.empty(4, dtype=torch.int64)
        grad, rows, weight = (torch.empty(*s).half() for s in ((4, 5), (4, 3), (5, 3)))
        outs = stratified_linear_backward(grad, rows, weight, ids, OFFSETS)
    assert [out.shape for out in outs] == [(4, 3), (3, 5, 3), (3, 5)]
    assert [out.dtype for out in outs] == [torch.float16, torch.float32, torch.float32]


def test_results_are_detached():
    grad = GRAD.clone().requires_grad_()
    outs = stratified_linear_backward(grad * 2, ROWS, WEIGHT, IDS, OFFSETS, ORDER)
    assert not any(out.requires_grad for out in outs)


@pytest.mark.cpp
def test_cpp_serves_by_default():
    if reason := library_refusal():
        pytest.skip(reason)
    before = _registry.num_calls("stratified_linear_backward", "cpp")
    outs = stratified_linear_backward(GRAD, ROWS, WEIGHT, IDS, OFFSETS, ORDER)
    assert_close(outs, GRAD, ROWS, WEIGHT, IDS, 3)
    assert _registry.num_calls("stratified_linear_backward", "cpp") == before + 1


def test_forced_backend_that_cannot_serve_says_why():
    half = [t.bfloat16() for t in (GRAD, ROWS, WEIGHT)]
    with pytest.raises(BackendUnavailableError, match=r"(?s)cpp: .*reference: can serve"):
        stratified_linear_backward(*half, IDS, OFFSETS, ORDER, backend="cpp")


def test_cost_is_that_of_one_backward():
    flop, num_bytes = cost(6400, 64, 64, 4, itemsize=4)
    assert flop == 4 * 6400 * 64 * 64 + 6400 * 64
    assert num_bytes == 4 * (6400 * 192 + 64 * 64 + 4 * 64 * 65)
    assert cost(6400, 64, 64, 8, 4)[0] == flop


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ROWS[0]}, r"rows: expected \[N, D_in\], .* got \[3\]"),
        ({"grad": GRAD[:3]}, r"grad: expected \[4, D_out\] torch.float32, .* got \[3, 5\]"),
        ({"grad": GRAD.double()}, "grad: expected .* got .* torch.float64"),
        ({"weight": WEIGHT.t()}, r"weight: expected \[5, 3\] .* got \[3, 5\]"),
        ({"weight": None}, "weight: grad_rows needs it, got None"),
        ({"ids": IDS[:3]}, r"ids: expected int64 \[4\], .* got torch.int64 \[3\]"),
        ({"ids": IDS.int()}, "ids: .* got torch.int32"),
        ({"order": ORDER.int()}, "order: .* got torch.int32"),
        ({"ids": IDS.to("meta")}, "ids: expected on cpu, as rows, got meta"),
        ({"row_offsets": (0, 3, 2, 4)}, r"row_offsets: .* got \[0, 3, 2, 4\]"),
        ({"row_offsets": (0, 3)}, r"row_offsets: expected S \+ 1 ascending numbers from 0 to 4"),
        ({"row_offsets": ()}, "row_offsets: .*; count rows by stratum"),
        (
            {"precision": "tf16"},
            "stratified_linear_backward: precision: expected one of ieee, tf32, "
            "tf32x3, got 'tf16'; leave it out for ieee",
        ),
    ],
)
def test_bad_input_says_what_was_expected(change, message):
    arguments = {
        "grad": GRAD, "rows": ROWS, "weight": WEIGHT, "ids": IDS, "row_offsets": OFFSETS,
        "order": ORDER,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        stratified_linear_backward(**(arguments | change))
