from __future__ import annotations

import pytest
import torch
from ragged_attention_cases import assert_close, oracle
from torch.utils._python_dispatch import TorchDispatchMode

from pinet_fast.errors import BackendUnavailableError, InputError
from pinet_fast.kernels import _registry, ragged_attention
from pinet_fast.kernels._library import library_refusal
from pinet_fast.kernels.ragged_attention import cost
from pinet_fast.kernels.ragged_attention import op as attention_op

op = torch.ops.pinet.ragged_attention.default
OFFSETS = torch.tensor([0, 3, 3, 4, 9])
QKV = torch.randn(9, 3, 2, 5)
SEED = torch.tensor([3])


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, requires_grad):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        qkv = QKV.to(dtype).clone().requires_grad_(requires_grad)
        for dropout in ((0.0, None), (0.5, SEED)):
            checks = torch.library.opcheck(op, (qkv, OFFSETS, 5, *dropout, backend))
            assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_plain_calls_are_the_op_without_the_dispatcher(monkeypatch, dropout):
    results = []
    for is_plain in (True, False):
        qkv = QKV.clone().requires_grad_()
        if not is_plain:
            monkeypatch.setattr(attention_op, "is_plain", lambda qkv: False)
        out = ragged_attention(qkv, OFFSETS, dropout=dropout, seed=SEED, max_len=5)
        assert ("_Attention" in type(out.grad_fn).__name__) == is_plain
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append((out, qkv.grad))
    for plain, registered in zip(*results, strict=True):
        assert torch.equal(plain, registered)


def test_batched_backwards_are_those_one_by_one():
    qkv = QKV.clone().requires_grad_()
    out = ragged_attention(qkv, OFFSETS, max_len=5)
    grads = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, qkv, grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, qkv, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(batched, torch.stack(single))


def test_who_looks_on_sees_the_op():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    seen = []
    with Names():
        ragged_attention(QKV, OFFSETS, max_len=5)
    assert "pinet::ragged_attention" in seen
    fake = ragged_attention(QKV.to("meta"), OFFSETS.to("meta"), max_len=5)
    assert fake.shape == (9, 2, 5)


def test_opcheck_of_the_backward():
    out, lse = op(QKV, OFFSETS, 5, 0.0, None, "")
    arguments = (torch.randn(9, 2, 5), QKV, OFFSETS, 5, 0.0, None, out, lse, "")
    checks = torch.library.opcheck(torch.ops.pinet.ragged_attention_backward.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(backend, dropout):
    if backend == "cpp" and (reason := library_refusal()):
        pytest.skip(reason)
    assert torch.autograd.gradcheck(
        lambda qkv: ragged_attention(qkv, OFFSETS, dropout=dropout, seed=SEED, backend=backend),
        QKV.double().requires_grad_(),
    )


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
# A rate from outside the function would be tried as a symbol first, which calls the backend twice.
@torch._dynamo.config.patch(specialize_float=True)
def test_compiles_into_one_graph_with_dynamic_sizes(engine, dropout):
    graphs = []
    base = torch._dynamo.lookup_backend(engine)

    def counting(graph, inputs):
        graphs.append(graph)
        return base(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def doubled(qkv, offsets, seed):
        return ragged_attention(qkv * 2, offsets, dropout=dropout, seed=seed, max_len=60)

    for lengths in ([5, 7, 3], [11, 2, 9, 30], [60, 1, 8, 0, 4]):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        qkv = torch.randn(sum(lengths), 3, 2, 5, requires_grad=True)
        grad = torch.randn(sum(lengths), 2, 5)
        out = doubled(qkv, offsets, SEED)
        expected = ragged_attention(qkv * 2, offsets, dropout=dropout, seed=SEED)
        torch.testing.assert_close(out, expected)
        mine = torch.autograd.grad(out, qkv, grad)
        torch.testing.assert_close(mine, torch.autograd.grad(expected, qkv, grad))
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_fake_tensors_give_shapes_and_dtypes():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        offsets = torch.empty(5, dtype=torch.int64)
        out, lse = op(torch.empty(9, 3, 2, 5).half(), offsets, 5, 0.0, None, "")
    assert out.shape == (9, 2, 5)
    assert out.dtype is torch.float16
    assert lse.shape == (9, 2)
    assert lse.dtype is torch.float32


def test_the_mask_comes_from_torchs_generator():
    torch.manual_seed(1)
    first = ragged_attention(QKV, OFFSETS, dropout=0.5)
    second = ragged_attention(QKV, OFFSETS, dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(ragged_attention(QKV, OFFSETS, dropout=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    ragged_attention(QKV, OFFSETS)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn without dropout


def test_a_gradient_of_a_gradient_is_refused():
    qkv = QKV.clone().requires_grad_()
    out = ragged_attention(qkv, OFFSETS)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of a gradient is not implemented"):
        grad.sum().backward()


@pytest.mark.cpp
def test_cpp_serves_by_default():
    if reason := library_refusal():
        pytest.skip(reason)
    names = ("ragged_attention", "ragged_attention_backward")
    before = [_registry.num_calls(name, "cpp") for name in names]
    qkv = QKV.clone().requires_grad_()
    out = ragged_attention(qkv, OFFSETS)
    assert_close(out.detach(), oracle(QKV, OFFSETS), torch.float32)
    out.sum().backward()
    assert [_registry.num_calls(name, "cpp") for name in names] == [n + 1 for n in before]


@pytest.mark.cpp
@pytest.mark.parametrize("offsets", [[0, 3, 2, 9], [1, 9], [0, 8], [0, 10]])
def test_cpp_refuses_offsets_that_do_not_cover_the_events(offsets):
    if reason := library_refusal():
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match=r"offsets: expected ascending numbers from 0 to .* 9;"):
        ragged_attention(QKV, torch.tensor(offsets), backend="cpp")


def test_forced_backend_that_cannot_serve_says_why():
    with pytest.raises(BackendUnavailableError, match=r"(?s)cpp: .*reference: can serve"):
        ragged_attention(QKV.bfloat16(), OFFSETS, backend="cpp")


def test_cost_counts_what_the_causal_mask_leaves():
    flop, num_bytes = cost([3, 0, 1, 5], heads=2, width=16, itemsize=4)
    assert flop == 2 * 2 * 16 * 2 * (6 + 1 + 15)
    assert num_bytes == 4 * 9 * 2 * (3 * 16 + 16 + 1) + 8 * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": QKV[:, :2]}, r"qkv: expected \[T, 3, H, D\], .* got \[9, 2, 2, 5\]"),
        ({"qkv": QKV[..., :0]}, r"qkv: expected .* got \[9, 3, 2, 0\]"),
        ({"qkv": QKV.long()}, "qkv: expected .* got .* torch.int64; stack"),
        ({"offsets": OFFSETS.int()}, r"offsets: expected int64 \[B \+ 1\], got torch.int32 \[5\]"),
        ({"offsets": OFFSETS[:0]}, r"offsets: expected .* got torch.int64 \[0\]"),
        ({"offsets": OFFSETS.to("meta"), "max_len": 5}, "offsets: expected on cpu, as qkv, got me"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: expected 0 <= dropout < 1, got -0.1"),
        ({"dropout": 0.1, "seed": torch.tensor(1)}, r"seed: expected int64 \[1\], got torch.int64"),
        ({"dropout": 0.1, "seed": torch.tensor([1.0])}, "seed: expected .* got torch.float32"),
    ],
)
def test_bad_input_says_what_was_expected(change, message):
    with pytest.raises(InputError, match=message):
        ragged_attention(**({"qkv": QKV, "offsets": OFFSETS} | change))
