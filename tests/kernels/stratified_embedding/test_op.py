from __future__ import annotations

import pytest
import torch
from stratified_embedding_cases import Case, added, oracle, same

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, stratified_embedding_add, stratified_embedding_reduce
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.stratified_embedding import cost

ops = torch.ops.pinet
reduce_op = ops.stratified_embedding_reduce.default
add_op = ops.stratified_embedding_add.default


def new_case():
    return Case(3, 20, (4, 5)).add(30, index_layout="row").add(0).add(7, "expanded", "column")


@pytest.mark.parametrize("backend", ["", "reference"])
def test_opcheck(backend):
    case = new_case()
    case.grads[0].requires_grad_()
    dense = torch.zeros(3, 20, 4, 5)
    for op, arguments in (
        (reduce_op, (*case.arguments, backend)),
        (add_op, (dense, *case.lists, backend)),
        (add_op, (dense, [], [], [], backend)),
    ):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_sizes_that_only_the_run_knows(engine):
    graphs = []
    base = torch._dynamo.lookup_backend(engine)

    def counting(graph, inputs):
        graphs.append(graph)
        return base(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def merge(ids, strata, grads, dense):
        rows, values, touched = stratified_embedding_reduce([ids], [strata], [grads * 2], 3, 20)
        stratified_embedding_add(dense, [ids], [strata], [grads])
        return rows + 1, values * 3, touched.sum(0)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count in (5, 11, 300):
            case = Case(3, 20, (4,), seed=count).add(count)
            dense = torch.ones(3, 20, 4)
            expected_dense = added(case, dense)
            (ids,), (strata,), (grads,) = case.lists
            got = merge(ids, strata, grads, dense)
            rows, values, touched = oracle(case)
            same(got, (rows + 1, values * 2 * 3, touched.sum(0)))
            same(dense, expected_dense)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_have_an_unknown_number_of_rows():
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    case = Case(3, 20, (4, 5), torch.bfloat16).add(6)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        lists = [[mode.from_tensor(x) for x in some] for some in case.lists]
        rows, values, touched = stratified_embedding_reduce(*lists, 3, 20)
    num_touched = rows.shape[0]
    assert isinstance(num_touched, torch.SymInt)
    assert (rows.dtype, values.dtype, touched.dtype) == (torch.int64, torch.bfloat16, torch.bool)
    assert values.shape == (3, num_touched, 4, 5)
    assert touched.shape == (3, num_touched)


def test_results_are_detached_and_the_target_is_marked_as_changed():
    case = new_case()
    case.grads[0].requires_grad_()
    case.grads[2] = case.grads[2] * torch.ones(1, requires_grad=True)
    for backend in (None, "reference"):
        assert not any(x.requires_grad for x in stratified_embedding_reduce(
            *case.arguments, backend=backend))  # fmt: skip
        dense = torch.ones(3, 20, 4, 5)
        saved = dense.new_ones((), requires_grad=True) * dense
        stratified_embedding_add(dense, *case.lists, backend=backend)
        assert not dense.requires_grad
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()


@pytest.mark.cpp
def test_cpp_serves_by_default():
    if reason := library_refusal():
        pytest.skip(reason)
    case = new_case()
    for op in ("stratified_embedding_reduce", "stratified_embedding_add"):
        before = _registry.num_calls(op, "cpp")
        if op == "stratified_embedding_reduce":
            stratified_embedding_reduce(*case.arguments)
        else:
            stratified_embedding_add(torch.zeros(3, 20, 4, 5), *case.lists)
        assert _registry.num_calls(op, "cpp") == before + 1


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("PINET_FAST_BACKEND", "reference")
    before = _registry.num_calls("stratified_embedding_reduce", "reference")
    stratified_embedding_reduce(*new_case().arguments)
    assert _registry.num_calls("stratified_embedding_reduce", "reference") == before + 1


def test_forced_backend_that_cannot_serve_says_why():
    case = Case(2, 3, (), torch.float16).add(4)
    message = r"(?s)'cpp' cannot serve.*dtype torch.float16 is neither.*reference: can serve"
    with pytest.raises(BackendUnavailableError, match=message):
        stratified_embedding_reduce(*case.arguments, backend="cpp")
    with pytest.raises(BackendUnavailableError, match=message):
        stratified_embedding_add(torch.zeros(2, 3).half(), *case.lists, backend="cpp")


def test_cost_reads_each_gradient_once_and_writes_each_sum_once():
    assert cost(num_entries=100, num_touched=40, num_strata=4, width=64, itemsize=4) == (
        6400,
        100 * 64 * 4 + 100 * 16 + 4 * 40 * (64 * 4 + 1) + 40 * 8,
    )


ZEROS, G = torch.zeros(6, dtype=torch.int64), torch.ones(6, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], [], 2, 3), "grads: expected at least one tensor, got none"),
        (([ZEROS], [ZEROS], [G], 0, 3), "expected num_strata >= 1 and num_rows >= 0, got 0 and 3"),
        (([ZEROS], [ZEROS], [G], 2, -1), "got 2 and -1"),
        (
            ([ZEROS], [ZEROS, ZEROS], [G], 2, 3),
            "expected as many ids and strata as grads, got 1, 2 and 1",
        ),
        (([ZEROS], [ZEROS], [G.int()], 2, 3), "expected float32, .* got torch.int32; convert"),
        (
            ([ZEROS, ZEROS], [ZEROS, ZEROS], [G, G[:, :1]], 2, 3),
            r"grads\[1\]: expected torch.float32 \[N, 2\]",
        ),
        (
            ([ZEROS, ZEROS], [ZEROS, ZEROS], [G, G.double()], 2, 3),
            r"grads\[1\]: .* got torch.float64 \[6, 2\]",
        ),
        (
            ([ZEROS.int()], [ZEROS], [G], 2, 3),
            r"ids\[0\]: expected int64 \[6\], .* got torch.int32",
        ),
        (
            ([ZEROS], [ZEROS[:5]], [G], 2, 3),
            r"strata\[0\]: expected int64 \[6\], .* \[5\]; flatten",
        ),
        (([ZEROS.view(2, 3)], [ZEROS], [G], 2, 3), r"ids\[0\]: .* got torch.int64 \[2, 3\]"),
        (
            ([ZEROS.to("meta")], [ZEROS], [G], 2, 3),
            r"ids\[0\], .* expected device cpu, got meta, cpu",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=f"^stratified_embedding_reduce: .*{message}"):
        stratified_embedding_reduce(*arguments)


def test_a_gradient_without_dimensions_is_named():
    with pytest.raises(InputError, match=r"grads\[0\]: expected torch.float32 .* got .* \[\]"):
        stratified_embedding_reduce([ZEROS], [ZEROS], [torch.tensor(1.0)], 2, 3)


@pytest.mark.parametrize(
    "dense",
    [torch.zeros(3), torch.zeros(1, 3, 2).expand(4, 3, 2), torch.zeros(4, 3, 2).requires_grad_()],
)
def test_a_target_that_cannot_be_written_is_named(dense):
    with pytest.raises(InputError, match=r"^stratified_embedding_add: dense: expected \[S, V"):
        stratified_embedding_add(dense, [ZEROS], [ZEROS], [G])


def test_lookups_that_do_not_fit_the_target_are_named():
    with pytest.raises(InputError, match=r"grads\[0\]: expected torch.float64 \[N, 2\]"):
        stratified_embedding_add(torch.zeros(4, 3, 2).double(), [ZEROS], [ZEROS], [G])
