from __future__ import annotations

import pytest
import torch
from host_reads import NoHostReads
from stratum_combine_cases import Case, assert_close, oracle

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, stratum_combine
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.stratum_combine import cost

op = torch.ops.pinet.stratum_combine.default
W = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_opcheck(backend):
    grads = [torch.randn(3, 4, 5), torch.randn(3, 2, 6), torch.randn(7).expand(3, 7)]
    outs = [torch.randn(5, 4).t(), torch.randn(9, 6), torch.randn(7)]
    rows = [None, torch.tensor([2, 8]), None]
    scale = torch.tensor(0.5).double()
    for weights in (W, torch.rand(3, 3).double()):
        arguments = (grads, weights, outs, scale, [True, False, False], rows, backend)
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_dynamic_sizes(engine):
    graphs = []
    base = torch._dynamo.lookup_backend(engine)

    def counting(graph, inputs):
        graphs.append(graph)
        return base(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def combine(a, b, held):
        out = torch.empty_like(b[0])
        stratum_combine([a * 2, b], W, [held, out], accumulate=[True, False])
        return out * 3

    for columns in (5, 11, 300):
        a, b, held = torch.randn(3, columns, 4), torch.randn(3, columns), torch.ones(columns, 4)
        got = combine(a, b, held)
        torch.testing.assert_close(got, 3 * (0.5 * b[0] + 2 * b[2]))
        torch.testing.assert_close(held, 1 + a[0] + 4 * a[2])
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_pass():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        weights = torch.empty(4, dtype=torch.float64)
        assert stratum_combine([torch.empty(4, 6)], weights, [torch.empty(6)]) is None


def test_autograd_knows_that_outputs_change():
    out, x = torch.ones(2), torch.ones(2, requires_grad=True)
    saved = x * out
    version = out._version
    stratum_combine([torch.ones(3, 2, requires_grad=True) * 2], W, [out])
    assert out._version > version
    assert not out.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.cpp
def test_cpp_serves_by_default():
    if reason := library_refusal():
        pytest.skip(reason)
    before = _registry.num_calls("stratum_combine", "cpp")
    stratum_combine([torch.ones(3, 2)] * 2, W, [torch.empty(2), torch.empty(2)])
    assert _registry.num_calls("stratum_combine", "cpp") == before + 1


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("PINET_FAST_BACKEND", "reference")
    before = _registry.num_calls("stratum_combine", "reference")
    stratum_combine([torch.ones(3, 2)], W, [torch.empty(2)])
    assert _registry.num_calls("stratum_combine", "reference") == before + 1


def test_forced_backend_that_cannot_serve_says_why():
    with pytest.raises(BackendUnavailableError, match=r"(?s)cpp: .*reference: can serve"):
        stratum_combine([torch.ones(3, 2)], W, [torch.empty(2)], backend="triton")


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_reference_reads_no_value_of_a_gpu_on_the_host(dtype, accumulate):
    """What it does on a GPU, on a CPU: also right."""
    from pinet_fast.kernels.stratum_combine.reference import by_masks

    case = Case(3, torch.Generator().manual_seed(0))
    for rows, num_rows in ((None, None), ([0, 3, 4], 6)):
        case.add((3, 7), dtype=dtype, accumulate=accumulate, rows=rows, num_rows=num_rows)
    weights = case.weights(per_parameter=True)
    expected = oracle(case, weights)
    for grad in case.grads:
        grad[1] = torch.nan  # has no weight
    with NoHostReads():
        by_masks(case.grads, weights, case.outs, case.accumulate, case.rows)
    assert_close(case, *expected)


def test_cost_reads_each_gradient_once_and_writes_each_output_once():
    assert cost([(8, 1000, 100), (8, 100)], itemsize=4) == (
        15 * 100_100,
        9 * 100_100 * 4 + 2 * 64,
    )
    assert cost([(8, 100)], 4, accumulate=True) == (1600, 10 * 400 + 64)


GRAD, OUT = torch.ones(3, 2, 4), torch.empty(2, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], W, []), {}, "expected P >= 1 gradients and as many outs, .* got 0, 0, 0 and 0"),
        (([GRAD], W, []), {}, "got 1, 0, 1 and 1"),
        (([GRAD], W, [OUT]), {"accumulate": [True] * 2}, "got 1, 1, 2 and 1"),
        (([torch.tensor(1.0)], W, [OUT]), {}, r"grads\[0\]: expected a shape .* got \[\]"),
        (([GRAD, GRAD[:2]], W, [OUT, OUT]), {}, r"grads\[1\]: expected .* got \[2, 2, 4\]"),
        (([GRAD.int()], W, [OUT]), {}, r"grads\[0\], outs\[0\]: .* got torch.int32 and"),
        (([GRAD], W, [OUT.to("meta")]), {}, r"expected device cpu .* got cpu and meta"),
        (([GRAD], W, [OUT.clone().requires_grad_()]), {}, "pass p.grad, not p"),
        (([GRAD], W, [OUT.t()]), {}, r"outs\[0\]: expected \[2, 4\], .* got \[4, 2\]"),
        (([GRAD], W.float(), [OUT]), {}, "weights: expected float64 on cpu, got torch.float32"),
        (([GRAD], W[:2], [OUT]), {}, r"weights: expected \[3\] or \[1, 3\], got \[2\]"),
        (([GRAD], W.expand(2, 3), [OUT]), {}, r"weights: .* got \[2, 3\]"),
        (([GRAD], W, [OUT]), {"scale": W}, r"scale: expected one float64 .* got .* \[3\]"),
        (([GRAD], W, [OUT]), {"scale": torch.tensor(1.0)}, "scale: .* got torch.float32"),
        (([GRAD], W, [OUT]), {"rows": [torch.ones(2)]}, r"rows\[0\]: expected int64 \[U\]"),
        (
            ([GRAD], W, [OUT]),
            {"rows": [torch.tensor([1])]},
            r"grads\[0\]: expected \[S, U, ...\] with U = 1 .* got \[3, 2, 4\]",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(InputError, match=f"^stratum_combine: .*{message}"):
        stratum_combine(*arguments, **options)
