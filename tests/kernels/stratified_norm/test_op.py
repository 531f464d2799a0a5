from __future__ import annotations

import pytest
import torch
from host_reads import NoHostReads
from stratified_norm_cases import assert_close, make_case

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, stratified_norm_backward
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.stratified_norm import cost

op = torch.ops.pinet.stratified_norm_backward.default
EVERYTHING = (True, True, True)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("need", [EVERYTHING, (True, False, False), (False, True, False)])
def test_opcheck(backend, need):
    for case in (
        make_case(6, 5),
        make_case(7, 4, layouts=("transposed", "strided"), has_weight=False),
        make_case(3, 4, dtype=torch.float64),
    ):
        case.rows.requires_grad_()
        checks = torch.library.opcheck(op, (*case.arguments(), *need, backend))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offsets_of_sorted_strata_change_nothing(backend, dtype):
    case = make_case(70, 6, dtype=dtype)
    case.ids = case.ids.sort().values
    offsets = (0, *torch.bincount(case.ids, minlength=3).cumsum(0).tolist())
    given = stratified_norm_backward(*case.arguments(), row_offsets=offsets, backend=backend.name)
    found = stratified_norm_backward(*case.arguments(), backend=backend.name)
    for mine, theirs in zip(given, found, strict=True):
        assert torch.equal(mine, theirs)
    arguments = (*case.arguments(), *EVERYTHING, backend.name, list(offsets))
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("offsets", [(0, 4), (0, 2, 1, 4), (1, 2, 3, 4), (0, 1, 2, 3), ()])
def test_offsets_of_other_rows_are_refused(offsets):
    with pytest.raises(InputError, match="row_offsets: expected 4 ascending numbers from 0 to 4"):
        stratified_norm_backward(*make_case(4, 6).arguments(), row_offsets=offsets)


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_dynamic_sizes(engine):
    graphs = []
    base = torch._dynamo.lookup_backend(engine)

    def counting(graph, inputs):
        graphs.append(graph)
        return base(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def backward(grad, rows, mean, rstd, weight, ids):
        grad_rows, none, grad_bias = stratified_norm_backward(
            grad, rows, mean, rstd, weight, ids, 3, need_weight=False
        )
        assert none is None
        return grad_rows * 2, grad_bias

    for count in (5, 11, 300):
        case = make_case(count, 6)
        grad_rows, _, grad_bias = stratified_norm_backward(*case.arguments())
        got = backward(*case.arguments()[:-1])
        assert torch.equal(got[0], grad_rows * 2)
        assert torch.equal(got[1], grad_bias)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_give_shapes_and_dtypes():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        case = make_case(4, 6, dtype=torch.bfloat16)
        out = stratified_norm_backward(*case.arguments())
    assert [tuple(x.shape) for x in out] == [(4, 6), (3, 6), (3, 6)]
    assert [x.dtype for x in out] == [torch.bfloat16, torch.float32, torch.float32]


def test_results_are_detached():
    case = make_case(4, 6)
    case.rows.requires_grad_()
    case.weight.requires_grad_()
    assert not any(x.requires_grad for x in stratified_norm_backward(*case.arguments()))


@pytest.mark.cpp
def test_cpp_serves_by_default():
    if reason := library_refusal():
        pytest.skip(reason)
    before = _registry.num_calls("stratified_norm_backward", "cpp")
    case = make_case(4, 6)
    assert_close(stratified_norm_backward(*case.arguments()), case)
    assert _registry.num_calls("stratified_norm_backward", "cpp") == before + 1


def test_mixed_dtypes_are_left_to_the_reference():
    case = make_case(40, 6)
    case.weight = case.weight.double()
    assert_close(stratified_norm_backward(*case.arguments()), case)
    reason = r"(?s)cpp: .*reference: can serve"
    with pytest.raises(BackendUnavailableError, match=reason):
        stratified_norm_backward(*case.arguments(), backend="cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_reads_no_value_of_a_gpu_on_the_host(dtype):
    """What it does on a GPU, on a CPU: also right."""
    from pinet_fast.kernels.stratified_norm import reference

    case = make_case(40, 6, dtype=dtype)
    outs = [torch.full((n, 6), torch.nan, dtype=dtype) for n in (40, 3, 3)]
    centred = case.rows - case.mean[:, None]
    with NoHostReads():
        arguments = (*case.arguments()[:-1], outs[0], None, None)
        outs[0] = reference.stratified_norm_backward_reference(*arguments)
        reference.sums_anywhere(case.grad, centred, case.rstd, case.ids, *outs[1:])
    assert_close(outs, case)


def test_cost_reads_and_writes_each_row_once():
    flop, num_bytes = cost(6400, 64, 4, itemsize=4)
    assert flop == 14 * 6400 * 64
    assert num_bytes == 3 * 6400 * 64 * 4 + 6400 * (4 + 4 + 8) + (2 * 4 + 1) * 64 * 4


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("rows", lambda x: x[0], r"rows: expected \[N, D\], .* got \[6\] torch.float32"),
        ("rows", lambda x: x.int(), r"rows: expected .* got \[4, 6\] torch.int32"),
        ("grad", lambda x: x[:3], r"grad: expected \[4, 6\] on cpu .* got \[3, 6\]"),
        ("mean", lambda x: x[:, None], r"mean: expected \[4\] .* got \[4, 1\]"),
        ("rstd", lambda x: x.to("meta"), r"rstd: .* on meta"),
        ("weight", lambda x: x[:5], r"weight: expected \[6\] .* got \[5\]"),
        ("ids", lambda x: x.int(), r"ids: expected int64 \[4\] .* got torch.int32"),
        ("ids", lambda x: x[:3], r"ids: expected int64 \[4\] .* got torch.int64 \[3\]"),
        ("num_strata", lambda x: 0, "num_strata: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(field, change, message):
    case = make_case(4, 6)
    setattr(case, field, change(getattr(case, field)))
    with pytest.raises(InputError, match=f"^stratified_norm_backward: .*{message}"):
        stratified_norm_backward(*case.arguments())
