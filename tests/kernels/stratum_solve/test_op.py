from __future__ import annotations

import pytest
import torch
from host_reads import NoHostReads
from stratum_solve_cases import make_gram

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, stratum_solve
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.stratum_solve import RULES, _cpp, _simplex, cost, reference

op = torch.ops.pinet.stratum_solve.default


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("rule", ["agreement", "pcgrad"])
def test_opcheck(backend, rule):
    for gram in (
        make_gram("random", 3, 0),
        make_gram("random", 3, 0, (2,)).requires_grad_(),
        make_gram("random", 6, 0)[::2, ::2],
    ):
        keys = torch.rand(3, 3).double()
        checks = torch.library.opcheck(op, (gram, rule, [True, False, True], 0.5, keys, backend))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_dynamic_sizes(engine):
    graphs = []
    base = torch._dynamo.lookup_backend(engine)

    def counting(graph, inputs):
        graphs.append(graph)
        return base(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting)
    def solve(gram):
        return stratum_solve(gram * 2, "agreement").sum(0)

    for count in (2, 3, 30):
        gram = make_gram("random", 4, count, (count,))
        torch._dynamo.mark_dynamic(gram, 0)
        torch.testing.assert_close(solve(gram), stratum_solve(gram * 2, "agreement").sum(0))
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_give_shape_dtype_and_device():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        w = stratum_solve(torch.empty(3, 4, 4, dtype=torch.float64), "cagrad")
    assert (w.shape, w.dtype) == ((3, 4), torch.float64)
    meta = torch.empty(4, 4, dtype=torch.float64, device="meta")
    assert stratum_solve(meta, "mgda").device.type == "meta"


def test_result_is_detached():
    gram = make_gram("random", 3, 0).requires_grad_()
    for backend in (None, "reference"):
        assert not stratum_solve(gram * 2, "balanced", backend=backend).requires_grad


@pytest.mark.cpp
@pytest.mark.parametrize("rule", RULES)
def test_cpp_serves_by_default(rule):
    if reason := library_refusal():
        pytest.skip(reason)
    before = _registry.num_calls("stratum_solve", "cpp")
    stratum_solve(make_gram("random", 3, 0), rule)
    assert _registry.num_calls("stratum_solve", "cpp") == before + 1


def test_the_reference_reads_no_value_on_the_host():
    """On CUDA that would wait for the device; ``eigh`` of imtlg and alignedmtl does, unseen."""
    gram, out = make_gram("random", 5, 0, (2,)), torch.empty(2, 5, dtype=torch.float64)
    for rule in RULES:
        for kept in ([0, 1, 2, 3, 4], [1, 4]):
            with NoHostReads():
                reference.stratum_solve_reference(gram, rule, kept, 0.5, None, out)
    with NoHostReads():
        _simplex.on_device(gram)


def test_rules_are_numbered_as_listed():
    assert tuple(_cpp._NUMBER) == RULES
    assert list(_cpp._NUMBER.values()) == list(range(len(RULES)))


def test_forced_backend_that_cannot_serve_says_why(monkeypatch):
    with pytest.raises(BackendUnavailableError, match=r"triton: .*\n.*reference: can serve"):
        stratum_solve(make_gram("random", 3, 0), "cagrad", backend="triton")
    monkeypatch.setenv("PINET_FAST_BACKEND", "reference")
    before = _registry.num_calls("stratum_solve", "reference")
    stratum_solve(make_gram("random", 3, 0), "mgda")
    assert _registry.num_calls("stratum_solve", "reference") == before + 1


def test_cost_grows_with_strata():
    assert cost("mgda", 1, 8)[1] == (64 + 8) * 8
    for rule in RULES:
        flop, num_bytes = cost(rule, 1, 4)
        assert 0 < flop < cost(rule, 1, 8)[0] <= cost(rule, 2, 8)[0] / 2
        assert cost(rule, 5, 4) == (5 * flop, 5 * num_bytes)


GRAM = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gram", "options", "message"),
    [
        (GRAM, {"rule": "median"}, "rule: expected one of agreement, .*; got 'median'"),
        (GRAM[0], {}, r"gram: expected \[S, S\] or .*, got \[3\]"),
        (GRAM[:2], {}, r"gram: expected .* got \[2, 3\]"),
        (torch.tensor(1.0).double(), {}, r"gram: expected .* got \[\]"),
        (GRAM[:0, :0], {}, r"gram: expected .* got \[0, 0\]"),
        (GRAM.float(), {}, "gram: expected float64, got torch.float32"),
        (GRAM, {"present": [True]}, r"present: expected 3 values.*got \[True\]"),
        (GRAM, {"present": [False] * 3}, "present: expected 3 values, at least one"),
        (GRAM, {"c": 1.0}, "c: expected 0 <= c < 1, got 1.0"),
        (GRAM, {"keys": GRAM[:2]}, r"keys: expected float64 \[3, 3\] on cpu, got .*\[2, 3\]"),
        (GRAM, {"keys": GRAM.float()}, "keys: .* got torch.float32"),
    ],
)
def test_wrong_arguments_are_named(gram, options, message):
    rule = options.pop("rule", "mgda")
    with pytest.raises(InputError, match=f"^stratum_solve: {message}"):
        stratum_solve(gram, rule, **options)
