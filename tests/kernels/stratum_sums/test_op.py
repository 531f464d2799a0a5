from __future__ import annotations

import pytest
import torch
from host_reads import NoHostReads
from stratum_sums_cases import LAYOUTS, assert_close, make_ids, make_rows

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, stratum_sums
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.stratum_sums import cost

op = torch.ops.pinet.stratum_sums.default
IDS = torch.tensor([0, 2, 2, 1])


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, requires_grad):
    for rows in (torch.randn(4, 5), torch.randn(6, 4).double().t(), torch.randn(4, 3).bfloat16()):
        rows.requires_grad_(requires_grad)
        checks = torch.library.opcheck(op, (rows, IDS, 3, backend))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_dynamic_sizes(engine):
    graphs = []
    base = torch._dynamo.lookup_backend(engine)

    def counting(graph, inputs):
        graphs.append(graph)
        return base(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def doubled(rows, ids):
        return stratum_sums(rows * 2, ids, 3) + 1

    for count in (5, 11, 300):
        rows, ids = torch.randn(count, 6), torch.randint(0, 3, (count,))
        assert torch.equal(doubled(rows, ids), stratum_sums(rows * 2, ids, 3) + 1)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_give_shape_and_dtype():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        ids = torch.empty(4, dtype=torch.int64)
        out = stratum_sums(torch.empty(4, 6, dtype=torch.float16), ids, 3)
    assert (out.shape, out.dtype) == ((3, 6), torch.float32)


def test_result_is_detached():
    rows = torch.randn(4, 5, requires_grad=True)
    assert not stratum_sums(rows * 2, IDS, 3).requires_grad


@pytest.mark.cpp
def test_cpp_serves_by_default():
    if reason := library_refusal():
        pytest.skip(reason)
    before = _registry.num_calls("stratum_sums", "cpp")
    rows = torch.randn(4, 5)
    assert_close(stratum_sums(rows, IDS, 3), rows, IDS, 3)
    assert _registry.num_calls("stratum_sums", "cpp") == before + 1


def test_forced_backend_that_cannot_serve_says_why():
    with pytest.raises(BackendUnavailableError, match=r"(?s)cpp: .*reference: can serve"):
        stratum_sums(torch.ones(4, 2).bfloat16(), IDS, 3, backend="cpp")


@pytest.mark.parametrize("order", ["sorted", "any"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_reference_reads_no_value_of_a_gpu_on_the_host(order, layout, dtype):
    """What it does on a GPU, on a CPU: also right."""
    from pinet_fast.kernels.stratum_sums.reference import masked_sums

    generator = torch.Generator().manual_seed(0)
    rows = make_rows(70, 33, layout, dtype, generator)
    ids = make_ids(70, 4, order, generator)
    out = torch.full((5, 33), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    with NoHostReads():
        masked_sums(rows, ids, out)
    assert_close(out, rows, ids, 5)


def test_cost_reads_each_row_once():
    assert cost(6400, 64, 4, itemsize=4) == (6400 * 64, 6404 * 64 * 4 + 6400 * 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4), IDS, 3), r"rows: expected \[N, D\], .* got \[4\] torch.float32"),
        ((torch.ones(4, 2).int(), IDS, 3), r"rows: expected .* got \[4, 2\] torch.int32"),
        ((torch.ones(3, 2), IDS, 3), r"ids: expected int64 \[3\] on cpu, .* got torch.int64 \[4\]"),
        ((torch.ones(4, 2), IDS.int(), 3), "ids: .* got torch.int32"),
        ((torch.ones(4, 2), IDS.to("meta"), 3), r"ids: .* got torch.int64 \[4\] on meta"),
        ((torch.ones(4, 2), IDS, 0), "num_strata: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=f"^stratum_sums: .*{message}"):
        stratum_sums(*arguments)
