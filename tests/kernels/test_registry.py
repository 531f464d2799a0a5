from __future__ import annotations

import logging

import pytest
import torch

import pinet_fast.kernels as kernels
from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, backend_status, describe_status, explain, stratum_gram
from pinet_fast.kernels._registry import Backend


def backend(name, priority, missing=None, refuses=None):
    return Backend(
        name=name,
        priority=priority,
        probe=lambda: missing,
        is_supported=lambda x: refuses,
        impl=lambda x: name,
    )


@pytest.fixture
def register(monkeypatch):
    """Register a toy op, for the length of one test, in a registry of its own."""
    monkeypatch.delenv("PINET_FAST_BACKEND", raising=False)
    monkeypatch.setattr(_registry, "_ops", {})
    monkeypatch.setattr(_registry, "_arguments", {})
    monkeypatch.setattr(_registry, "_logged", set())
    return lambda *backends: _registry.register("toy", backends, lambda x, scale=1: (x,))


def test_highest_priority_that_serves_is_chosen(register):
    register(backend("reference", 0), backend("cpp", 30), backend("triton", 20))
    assert _registry.select("toy", (1,)).name == "cpp"


def test_explicit_beats_environment_beats_priority(register, monkeypatch):
    register(backend("reference", 0), backend("cpp", 30), backend("triton", 20))
    monkeypatch.setenv("PINET_FAST_BACKEND", "triton")
    assert _registry.select("toy", (1,)).name == "triton"
    assert _registry.select("toy", (1,), "reference").name == "reference"


def test_automatic_fallback_is_logged_once(register, caplog):
    register(backend("reference", 0), backend("cpp", 30, missing="not built"))
    with caplog.at_level(logging.INFO, logger="pinet_fast.kernels"):
        for _ in range(3):
            assert _registry.select("toy", (1,)).name == "reference"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "toy: reference serves; passed over: cpp (not built)")
    ]


@pytest.mark.parametrize("by_environment", [False, True])
def test_forced_backend_that_cannot_serve_raises_with_every_reason(
    register, monkeypatch, by_environment
):
    register(
        backend("reference", 0),
        backend("cpp", 30, missing="not built"),
        backend("triton", 20, refuses="17 strata"),
    )
    if by_environment:
        monkeypatch.setenv("PINET_FAST_BACKEND", "cpp")
    with pytest.raises(BackendUnavailableError) as error:
        _registry.select("toy", (1,), None if by_environment else "cpp")
    message = str(error.value)
    assert "toy: backend 'cpp' cannot serve" in message
    assert ("PINET_FAST_BACKEND" if by_environment else "backend=") in message
    for line in ("cpp: not built", "triton: 17 strata", "reference: can serve"):
        assert line in message


def test_explain_gives_a_line_per_backend_in_the_order_of_trying(register):
    register(
        backend("reference", 0),
        backend("cpp", 30, missing="not built"),
        backend("triton", 20, refuses="17 strata"),
    )
    expected = "cpp: not built\ntriton: 17 strata\nreference: can serve"
    assert explain("toy", [1]) == explain("toy", (1, 2)) == expected


@pytest.mark.parametrize(
    ("op", "inputs", "message"),
    [
        ("tyo", [1], "op: expected one of toy; got 'tyo'; did you mean 'toy'?"),
        ("gram", [1], "op: expected one of toy; got 'gram'; choose one of them"),
        ("toy", [], r"inputs: expected the arguments of toy \(x, scale\), got 0 of them"),
        ("toy", [1, 2, 3], r"inputs: expected the arguments of toy \(x, scale\), got 3"),
    ],
)
def test_explain_names_what_it_cannot_explain(register, op, inputs, message):
    register(backend("reference", 0))
    with pytest.raises(InputError, match=f"^explain: {message}".replace("?", r"\?")):
        explain(op, inputs)


def arguments_of_every_op():
    rows, ids, offsets = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 2]), (0, 2, 5, 6)
    grads, gram = [torch.randn(3, 4)], torch.eye(3, dtype=torch.float64)
    strata = [torch.zeros(6, dtype=torch.int64)]
    return {
        "dropout_mask": [rows, 0.5],
        "stratum_gram": [grads],
        "stratum_solve": [gram, "agreement"],
        "stratum_combine": [grads, torch.ones(3).double(), [torch.empty(4)]],
        "stratum_sums": [rows, ids, 3],
        "stratified_norm_backward": [rows, rows, rows[:, 0], rows[:, 0], None, ids, 3],
        "stratified_linear_backward": [rows, rows, torch.randn(4, 4), ids, offsets],
        "stratified_embedding_reduce": [[ids], strata, [rows], 1, 3],
        "stratified_embedding_add": [torch.zeros(1, 3, 4), [ids], strata, [rows]],
        "ragged_attention": [torch.randn(6, 3, 1, 4), torch.tensor([0, 2, 6])],
        "routed_linear": [rows, torch.randn(3, 2, 4), None, ids, offsets],
    }


def test_explain_knows_every_public_op(monkeypatch):
    monkeypatch.delenv("PINET_FAST_BACKEND", raising=False)
    inputs = arguments_of_every_op()
    public = set(kernels.__all__) - {"backend_status", "describe_status", "explain"}
    assert set(inputs) == public
    for op, arguments in inputs.items():
        lines = dict(line.split(": ", 1) for line in explain(op, arguments).splitlines())
        on_cpu = op in ("dropout_mask", "ragged_attention")
        tried = ["cpp", "reference"] if on_cpu else ["cpp", "triton", "reference"]
        assert list(lines) == tried
        assert lines["reference"] == "can serve"
        # What it says is what happens.
        getattr(kernels, op)(*arguments, backend="reference")
        for name in tried[:-1]:
            if lines[name] == "can serve":
                getattr(kernels, op)(*arguments, backend=name)
            else:
                with pytest.raises(BackendUnavailableError) as error:
                    getattr(kernels, op)(*arguments, backend=name)
                assert f"{name}: {lines[name]}" in str(error.value)


def test_explain_sees_what_a_backend_refuses():
    lines = explain("stratum_gram", [[torch.ones(2, 3, dtype=torch.bfloat16)]]).splitlines()
    assert lines[0] in (
        "cpp: dtype torch.bfloat16 is neither float32 nor float64",
        f"cpp: {backend_status()['cpp']}",
    )


def test_unknown_backend_raises(register):
    register(backend("reference", 0))
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot serve"):
        _registry.select("toy", (1,), "cuda")


def test_status_names_every_backend_and_why_it_is_off(register):
    register(backend("reference", 0), backend("cpp", 30, missing="no compiled library"))
    assert backend_status() == {"cpp": "no compiled library", "reference": None}
    assert describe_status() == "kernels: reference serves (cpp: no compiled library)"


def test_status_of_this_installation():
    status = backend_status()
    assert set(status) == {"cpp", "triton", "reference"}
    assert status["reference"] is None
    assert describe_status().startswith("kernels: ")


def test_calls_are_counted_per_backend():
    before = _registry.num_calls("stratum_gram", "reference")
    stratum_gram([torch.ones(2, 3)], backend="reference")
    assert _registry.num_calls("stratum_gram", "reference") == before + 1


def test_import_loads_neither_triton_nor_the_library(bare_checkout, run_isolated):
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "import torch; torch_loads_triton = 'triton' in sys.modules\n"
        "import pinet_fast.kernels as kernels\n"
        "from pinet_fast.kernels import _library\n"
        "print(torch_loads_triton, 'triton' in sys.modules, torch.cuda.is_initialized(),"
        " _library.library_refusal.cache_info().currsize)"
    )
    assert run_isolated(bare_checkout, code).split() == ["False", "False", "False", "0"]
