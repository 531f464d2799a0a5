"""Compiled models: graphs that stratify, once eager steps have proven every boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast import GradientAggregator
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch",
    # Dynamo looks at what goes from one graph to the next.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)  # fmt: skip
S, D, ITEMS, LENGTH = 3, 4, 11, 5


class Pick:
    """A rule that puts all weight on one stratum."""

    index = 0

    def __call__(self, gram: Tensor) -> Tensor:
        weights = torch.zeros(len(gram), dtype=gram.dtype)
        weights[self.index] = 1.0
        return weights


class Graphs:
    """Counts what Dynamo hands to a backend; eager execution of what AOTAutograd makes of it."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.count = 0
        self.backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.count += 1
        return self.backend(graph, example_inputs)


class Base(nn.Module):
    """Item ids [B, L] to one loss a user."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, D, padding_idx=0)


class Tied(Base):
    """Weight norm, layer norm, and the table as the output layer in three spellings."""

    def __init__(self, spelling: str = ".T") -> None:
        super().__init__()
        self.mix = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
        self.norm = nn.LayerNorm(D)
        self.spelling = spelling

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.mix(self.items(ids))))
        weight = self.items.weight
        if self.spelling == "F.linear":
            logits = F.linear(hidden, weight)
        else:
            logits = hidden @ (weight.T if self.spelling == ".T" else weight.t())
        return logits.logsumexp(-1).sum(1)


class Encoder(Base):
    """Attention, positions, a gate on either side, differences, two lookups in one table."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(LENGTH + 2, D))
        self.layer = nn.TransformerEncoderLayer(D, 2, 6, dropout=0.0, batch_first=True)
        self.gate, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(1, D))
        self.out = nn.Linear(D, 2, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.items(ids) + self.positions[: ids.shape[1]]
        x = self.gate * (self.shift - self.layer(x)) - self.shift
        scores = self.out(x * self.gate).square().sum(-1)
        return scores.sum(1) + self.items(ids.flip(1)).square().sum((1, 2))


class Flattened(Base):
    """Rows flattened users first and time first, and a norm on [L, B, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Tensor:
        users, length = ids.shape
        x = torch.tanh(self.first(self.items(ids).reshape(-1, D))).view(users, length, D)
        x = self.norm(x.transpose(0, 1))
        x = self.second(x.reshape(-1, D)).view(length, users, D)
        return x.square().sum((0, 2))


class Convolution(Base):
    """A layer whose boundary has no traced form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.items(ids).transpose(1, 2)).square().sum((1, 2))


class EvaluatedNorm(Base):
    """A layer under the slice rule, which has no traced form."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D).eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.items(ids).transpose(1, 2)).square().sum((1, 2))


class Filter(Base):
    """A filter of frequencies: products of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(D))

    def forward(self, ids: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.items(ids), dim=1) * self.gate
        return torch.fft.irfft(spectrum, n=ids.shape[1], dim=1).square().sum((1, 2))


class Branching(Tied):
    """A part that only later batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.prelu = nn.Linear(D, D), nn.PReLU()
        self.is_late = False

    def forward(self, ids: Tensor) -> Tensor:
        losses = super().forward(ids)
        if self.is_late:
            losses = losses + self.prelu(self.extra(self.items(ids))).square().sum((1, 2))
        return losses


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Loop:
    """Steps of a compiled model, each compared with S plain passes of the model as it is."""

    def __init__(self, model: nn.Module, backend: str = "aot_eager", **options: Any) -> None:
        self.model, self.rule, self.backend = model.double(), Pick(), Graphs(backend)
        sgd = torch.optim.SGD(model.named_parameters(), lr=0.05)
        self.opt = GradientAggregator(sgd, self.rule, num_strata=S, **options)
        self.compiled: Callable[..., Tensor] = torch.compile(
            model, backend=self.backend, dynamic=True
        )
        self.num_steps = 0
        self.by_scalar = False

    def step(self) -> None:
        i = self.num_steps
        strata = torch.randint(0, S, (6 + i,))
        strata[:S] = torch.arange(S)
        ids = torch.randint(0, ITEMS, (6 + i, LENGTH))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        expected = autograd_stratum_gradients(lambda: self.model(ids), strata, parameters, S)
        self.rule.index = i % S
        self.opt.zero_grad()
        with self.opt.stratify(strata, reduction="mean" if self.by_scalar else None):
            losses = self.compiled(ids)
        if self.by_scalar:
            losses.mean().backward()
        else:
            self.opt.backward(losses)
        for p, want in zip(parameters, expected, strict=True):
            got = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            torch.testing.assert_close(got, want[i % S], rtol=1e-9, atol=1e-12)
        self.opt.step()
        self.num_steps += 1


@pytest.mark.parametrize("spelling", [".T", ".t()", "F.linear"])
def test_a_tied_softmax_is_one_graph(spelling: str) -> None:
    """Proven eagerly, then compiled once for any number of users and any offsets."""
    loop = Loop(Tied(spelling))
    loop.step()
    assert loop.backend.count == 0
    assert loop.opt.report.leak == "proven"
    loop.step()
    # Dynamo traces once more where it meets a float (eps), and throws the first graph away.
    compiled = loop.backend.count
    assert 1 <= compiled <= 2
    for _ in range(10 if spelling == ".T" else 2):
        loop.step()
    assert loop.backend.count == compiled
    assert loop.opt.report.leak == "proven"
    assert not loop.opt.coverage().unproven


@pytest.mark.parametrize("make", [Encoder, Flattened])
def test_other_layers_are_one_graph(make: Callable[[], nn.Module]) -> None:
    loop = Loop(make())
    loop.step()
    loop.step()
    compiled = loop.backend.count
    assert compiled >= 1
    for _ in range(3):
        loop.step()
    assert loop.backend.count == compiled


def test_inductor() -> None:
    loop = Loop(Encoder(), "inductor")
    for _ in range(3):
        loop.step()
    assert loop.backend.count >= 1


def test_no_break_and_full_graphs() -> None:
    loop = Loop(Encoder())
    loop.compiled = torch.compile(loop.model, backend="aot_eager", fullgraph=True, dynamic=True)
    for _ in range(3):
        loop.step()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Convolution, "conv1d has no traced form"),
        (EvaluatedNorm, "batch_norm runs once a stratum"),
        (Filter, "mul of complex tensors has no traced form"),
    ],
)
def test_what_has_no_traced_form_runs_eagerly(
    make: Callable[[], nn.Module], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(make())
    loop.compiled = torch.compile(loop.model, backend=loop.backend, fullgraph=True)
    with caplog.at_level("INFO", "pinet_fast.aggregation"):
        for _ in range(3):
            loop.step()
    assert loop.backend.count == 0
    said = [r.message for r in caplog.records if "compiled models run eagerly" in r.message]
    assert said == [f"compiled models run eagerly inside stratify: {why}"]


def test_a_part_that_comes_later_runs_eagerly_until_it_is_proven() -> None:
    model = Branching()
    loop = Loop(model)
    for _ in range(3):
        loop.step()
    assert loop.backend.count >= 1
    model.is_late = True
    loop.step()
    loop.step()
    assert not loop.opt.coverage().unproven
    assert loop.opt.report.leak == "proven"


def test_frozen_and_thawed_parameters() -> None:
    """Parameters are counted by position: what was proven of others is not taken for theirs."""
    model = Tied()
    model.items.weight.requires_grad_(requires_grad=False)
    loop = Loop(model)
    for _ in range(3):
        loop.step()
    assert loop.backend.count >= 1
    model.items.weight.requires_grad_()
    for _ in range(3):
        loop.step()
    assert {e.parameter for e in loop.opt.coverage()} >= {"items.weight", "norm.weight"}


def test_a_scalar_loss() -> None:
    loop = Loop(Tied())
    loop.step()
    loop.by_scalar = True
    loop.step()
    loop.step()
    assert loop.backend.count >= 1


def test_sparse_tables_and_accumulation() -> None:
    """Lookups of a graph arrive as touched rows; two backwards add up."""
    table = nn.Embedding(ITEMS, D, sparse=True).double()
    head = nn.Linear(D, 1).double()

    def model(ids: Tensor) -> Tensor:
        return head(torch.tanh(table(ids))).squeeze(-1).sum(1)

    backend, rule = Graphs(), Pick()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    optimizers = [
        torch.optim.SparseAdam(table.parameters()), torch.optim.Adam(head.parameters())
    ]  # fmt: skip
    opt = GradientAggregator(optimizers, rule, num_strata=S)
    strata, batches = torch.tensor([2, 0, 1, 1]), torch.randint(0, ITEMS, (2, 4, LENGTH))
    parameters = [table.weight, *head.parameters()]
    for step in range(3):
        rule.index = step
        opt.zero_grad()
        dense = nn.Embedding.from_pretrained(table.weight.detach(), freeze=False)
        total = [torch.zeros_like(p) for p in parameters]
        for ids in batches:
            with opt.stratify(strata):
                losses = compiled(ids)
            opt.backward(losses)
            values = head(torch.tanh(dense(ids))).squeeze(-1).sum(1)[strata == step].mean()
            parts = torch.autograd.grad(values, [dense.weight, *head.parameters()])
            total = [a + b for a, b in zip(total, parts, strict=True)]
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse
        for p, want in zip(parameters, total, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad.to_dense(), want, rtol=1e-9, atol=1e-12)
        opt.step()
    assert backend.count >= 1


def test_ragged_events() -> None:
    """Rows are the T events: the layout of the loader's batches."""
    table, head = nn.Embedding(ITEMS, D).double(), nn.Linear(D, 1).double()
    norm = nn.LayerNorm(D).double()

    def model(ids: Tensor) -> Tensor:
        return head(norm(table(ids)).tanh()).squeeze(-1).square()

    backend, rule = Graphs(), Pick()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    parameters = [*table.parameters(), *head.parameters(), *norm.parameters()]
    opt = GradientAggregator(torch.optim.SGD(parameters, lr=0.1), rule, num_strata=S)
    for step in range(5):
        strata = torch.randint(0, S, (6 + step,))
        strata[:S] = torch.arange(S)
        lengths = torch.randint(1, 5, strata.shape)
        ids = torch.randint(0, ITEMS, (int(lengths.sum()),))
        rows = strata.repeat_interleave(lengths)
        expected = autograd_stratum_gradients(lambda i=ids: model(i), rows, parameters, S)
        rule.index = step % S
        opt.zero_grad()
        with opt.stratify(strata, lengths=lengths):
            losses = compiled(ids)
        opt.backward(losses)
        for p, want in zip(parameters, expected, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, want[step % S], rtol=1e-9, atol=1e-12)
    assert backend.count >= 1


def test_autocast() -> None:
    """As exact as the eager step, to the rounding of bf16 products."""
    model = Tied()
    parameters = list(model.parameters())
    backend, rule = Graphs(), Pick()
    compiled = torch.compile(model, backend=backend)
    opt = GradientAggregator(torch.optim.SGD(parameters, lr=0.1), rule, num_strata=S)
    ids, strata = torch.randint(0, ITEMS, (6, LENGTH)), torch.tensor([0, 1, 2, 2, 1, 0])

    def losses(call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(ids)

    expected = autograd_stratum_gradients(lambda: losses(model), strata, parameters, S)
    for s in range(S):
        rule.index = s
        opt.zero_grad()
        with opt.stratify(strata):
            values = losses(compiled)
        opt.backward(values)
        for p, want in zip(parameters, expected, strict=True):
            assert p.grad is not None
            assert p.grad.dtype == torch.float32
            error = float((p.grad - want[s]).abs().max() / want[s].abs().max())
            assert error <= 6 * 2**-8  # four products in bf16, and their gradients, lie in between
    assert backend.count >= 1


def test_a_batch_that_is_gone_is_named() -> None:
    key = torch.tensor([-1])
    rows = torch.ones(2, 2)
    from pinet_fast.aggregation import traced_ops  # noqa: F401  (registers the ops)

    with pytest.raises(AggregationError, match=r"the batch of this compiled graph is gone; call"):
        torch.ops.pinet_fast.traced_sums(rows, key, 0, 1, 1, 2)


def test_only_what_is_compiled_is_prepared_for() -> None:
    """Optimizers import the compiler; that alone must not cost an eager model anything."""
    from pinet_fast.aggregation.envelope import is_compiler_used

    model = nn.Linear(D, 1)
    adam = torch.optim.Adam(model.parameters())
    model(torch.randn(2, D)).sum().backward()
    adam.step()
    assert not is_compiler_used()
    torch.compile(model, backend="eager")
    assert is_compiler_used()
