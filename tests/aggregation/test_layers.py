"""Layers as people use them, in several layouts: exact, or refused by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator, StrataIndex
from pinet_fast.aggregation.losses import stratum_losses
from pinet_fast.errors import BoundaryError, RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

B, L, D = 7, 5, 6
IDS = {
    "unsorted": [2, 0, 1, 1, 0, 2, 2],
    "sorted": [0, 0, 1, 1, 2, 2, 2],
    "one-row and empty": [3, 0, 0, 3, 3, 1, 3],
}
NUM_STRATA = 4


def assert_exact(
    model: nn.Module,
    losses: Callable[[], Tensor],
    ids: Tensor,
    optimizer_has: nn.Module | None = None,
) -> GradientAggregator:
    """Compare with one autograd pass for each stratum, written without the library."""
    parameters = list(model.parameters())
    row_ids = ids.repeat_interleave(losses().numel() // len(ids))
    expected = autograd_stratum_gradients(losses, row_ids, parameters, NUM_STRATA)
    opt = GradientAggregator(torch.optim.SGD(model.named_parameters(), lr=0.1), "agreement")
    with opt.stratify(StrataIndex(ids, NUM_STRATA)):
        values = losses()
    session = opt._session
    assert session is not None
    reduced = stratum_losses(values, None, session.rows)
    found = session.stratum_gradients(reduced, step=0).strata
    largest = max(float(e.abs().max()) for e in expected)
    for name, p, mine, theirs in zip(
        session.names, session.parameters, found, expected, strict=True
    ):
        got = torch.zeros_like(theirs) if mine is None else mine.dense(p)
        assert float((got - theirs).abs().max()) <= 1e-10 * largest, name
    return opt


class Scored(nn.Module):
    """A layer between inputs and one loss a user."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """Return one loss a user from [B, ...]."""
        return self.call(self.layer, x).flatten(1).pow(2).sum(1)


def gru(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def time_major(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x.transpose(0, 1))
    return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.transpose(1, 2))


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    return layer(x, x, x, attn_mask=mask, need_weights=False)[0]


def time_major_attention(layer: nn.Module, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    return layer(y, y, y)[0].transpose(0, 1)


def seeded(layer: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(5)  # the same masks for the oracle and the library
    return layer(x)


def flattened(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.reshape(-1, D)).view(B, L, -1)


class TransposedLinear(nn.Module):
    """``addmm(bias, rows, W)`` on flattened rows, as language models of the GPT-2 kind have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, D), self.weight)
        return flat.view(*x.shape[:-1], 4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "linear": (lambda: nn.Linear(D, 4), lambda m, x: m(x)),
    "linear on [B * L, d]": (lambda: nn.Linear(D, 4), flattened),
    "layer_norm on [L, B, d]": (lambda: nn.LayerNorm(D), time_major),
    "GRU batch first": (lambda: nn.GRU(D, 3, num_layers=2, batch_first=True), gru),
    "GRU time-major": (lambda: nn.GRU(D, 3), time_major),
    "LSTM": (lambda: nn.LSTM(D, 3, batch_first=True, bidirectional=True), gru),
    "RNN": (lambda: nn.RNN(D, 3, batch_first=True), gru),
    "conv1d": (lambda: nn.Conv1d(D, 4, 3, padding=1), conv),
    "MHA batch first": (lambda: nn.MultiheadAttention(D, 2, batch_first=True), attention),
    "MHA time-major with weights": (lambda: nn.MultiheadAttention(D, 2), time_major_attention),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True),
        lambda m, x: m(x),
    ),
    "TransformerEncoder time-major": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0), 2, enable_nested_tensor=False
        ),
        time_major,
    ),
    "TransformerEncoderLayer with dropout": (
        lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.3, batch_first=True),
        seeded,
    ),
    "PReLU": (lambda: nn.PReLU(), lambda m, x: m(x)),
    "GroupNorm": (lambda: nn.GroupNorm(2, D), conv),
    "RMSNorm": (lambda: nn.RMSNorm(D), lambda m, x: m(x)),
    "RMSNorm on [L, B, d]": (lambda: nn.RMSNorm(D), time_major),
    "RMSNorm over [L, d]": (lambda: nn.RMSNorm([L, D]), lambda m, x: m(x)),
    "addmm": (TransposedLinear, lambda m, x: m(x)),
    "Bilinear": (lambda: nn.Bilinear(D, D, 3), lambda m, x: m(x, x)),
    "weight-normed linear": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, 4)),
        lambda m, x: m(x),
    ),
    "BatchNorm in evaluation": (lambda: nn.BatchNorm1d(D).eval(), conv),
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_exact(layer: str, ids: str) -> None:
    torch.manual_seed(0)
    make, call = LAYERS[layer]
    model = Scored(make().double(), call)
    x = torch.randn(B, L, D, dtype=torch.float64)
    assert_exact(model, lambda: model(x), torch.tensor(IDS[ids]))


class CLS(nn.Module):
    """A learned token in front, expanded over users: a parameter that becomes rows."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.mix = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.mix(y.cumsum(1)).pow(2).sum((1, 2))


def test_cls_token() -> None:
    torch.manual_seed(0)
    model = CLS().double()
    x = torch.randn(B, L, D, dtype=torch.float64)
    assert_exact(model, lambda: model(x), torch.tensor(IDS["unsorted"]))


def test_length_equal_to_batch_is_decided_by_the_graph() -> None:
    """Behind a boundary whose rows are known, [B, L, d] with L == B is no riddle."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user = nn.Linear(D, B * 4)  # rows known: [B, d]
            self.inner = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.user(x).view(B, B, 4)  # [B, L, d] with L == B
            y = self.norm(torch.relu(self.inner(y)).transpose(0, 1)).transpose(0, 1)
            y = self.inner(y.transpose(0, 1).reshape(-1, 4)).view(B, B, 4)  # L-major flattening
            return y.transpose(0, 1).pow(2).sum((1, 2))

    model = Model().double()
    x = torch.randn(B, D, dtype=torch.float64)
    assert_exact(model, lambda: model(x), torch.tensor(IDS["unsorted"]))


def test_length_equal_to_batch_without_history_is_refused() -> None:
    model = nn.Linear(D, 3)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with pytest.raises(RowLayoutError, match="undecided"), opt.stratify(IDS["sorted"]):
        model(torch.randn(B, B, D))


def test_batch_norm_in_training_is_refused_and_its_buffers_kept() -> None:
    model = nn.BatchNorm1d(D)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with (
        pytest.raises(BoundaryError, match=r"batch_norm.*across rows.*LayerNorm"),
        opt.stratify(IDS["unsorted"]),
    ):
        model(torch.randn(B, D))
    after = model.state_dict()
    for name in ("running_mean", "running_var"):
        assert torch.equal(after[name], before[name])


def test_a_reduction_over_rows_is_refused() -> None:
    weight = nn.Parameter(torch.ones(D))
    opt = GradientAggregator(torch.optim.SGD([weight], lr=0.1), "agreement")
    with pytest.raises(RowLayoutError, match="mixes or drops rows"), opt.stratify(IDS["unsorted"]):
        torch.einsum("bd,d->", torch.randn(B, D), weight)


@pytest.mark.parametrize("op", ["iadd", "isub", "imul", "add_", "sub_", "mul_"])
def test_rows_changed_in_place_by_a_parameter_are_exact(op: str) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(D, D)
            self.vector = nn.Parameter(torch.randn(D))

        def forward(self, x: Tensor) -> Tensor:
            rows = self.first(x) + 0.5  # tanh would save what is changed here
            kept = rows
            if op.endswith("_"):
                getattr(rows, op)(self.vector)
            elif op == "iadd":
                rows += self.vector
            elif op == "isub":
                rows -= self.vector
            else:
                rows *= self.vector
            assert kept is rows
            return (kept + 1).pow(3).sum(1)

    torch.manual_seed(0)
    model = Changed().double()
    x = torch.randn(B, D, dtype=torch.float64)
    assert_exact(model, lambda: model(x), torch.tensor(IDS["unsorted"]))


@pytest.mark.parametrize("op", ["mul_", "copy_"])
def test_a_parameter_changed_in_place_by_rows_is_refused(op: str) -> None:
    weight = nn.Parameter(torch.ones(B, D))
    opt = GradientAggregator(torch.optim.SGD([weight], lr=0.1), "agreement")
    with pytest.raises(BoundaryError, match="in place"), opt.stratify(IDS["unsorted"]):
        getattr(weight, op)(torch.randn(B, D))


def test_dropout_inside_a_sliced_function_still_trains() -> None:
    """A random forward cannot be compared with the whole batch; rows stay apart all the same."""
    layer = nn.GRU(D, 4, num_layers=2, dropout=0.5, batch_first=True)
    opt = GradientAggregator(torch.optim.SGD(layer.parameters(), lr=0.1), "agreement")
    x = torch.randn(B, L, D)
    for _ in range(3):
        opt.zero_grad()
        with opt.stratify(IDS["unsorted"]):
            losses = layer(x)[0].pow(2).sum((1, 2))
        opt.backward(losses)
        opt.step()
    assert math.isfinite(float(layer.weight_hh_l0.detach().sum()))
    assert opt.report.leak == "proven"


def test_which_layers_use_the_slice_rule() -> None:
    """Attention goes through linear boundaries; only what has no rule is sliced."""
    expected = {
        "MHA batch first": False, "GRU batch first": False, "LSTM": False, "RMSNorm": False,
        "layer_norm on [L, B, d]": False, "addmm": False, "conv1d": False, "GroupNorm": False,
        "Bilinear": False, "BatchNorm in evaluation": True,
    }  # fmt: skip
    for layer, sliced in expected.items():
        torch.manual_seed(0)
        make, call = LAYERS[layer]
        model = Scored(make().double(), call)
        x = torch.randn(B, L, D, dtype=torch.float64)
        opt = assert_exact(model, lambda m=model, y=x: m(y), torch.tensor(IDS["sorted"]))
        assert bool(opt._slice_proofs) == sliced
        assert bool(opt.coverage().sliced) == sliced


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "layer",
    ["linear", "RMSNorm", "addmm", "MHA batch first", "LSTM", "conv1d", "GroupNorm", "Bilinear"],
)
def test_the_forward_is_bit_identical(layer: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, call = LAYERS[layer]
    model = Scored(make().to(dtype), call)
    x = torch.randn(B, L, D, dtype=dtype)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    plain = model(x)
    with opt.stratify(torch.tensor(IDS["unsorted"])):
        assert torch.equal(model(x), plain)


def test_coverage_says_who_computes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, D), nn.LayerNorm(D), nn.Linear(D, D), nn.PReLU())
    opt = GradientAggregator(torch.optim.SGD(model.named_parameters(), lr=0.1), "agreement")
    with opt.stratify([0, 1, 1]):
        losses = model(torch.randint(9, (3,))).square().sum(1)
    opt.backward(losses)
    backends = {entry.op: entry.backend for entry in opt.coverage()}
    for op in ("embedding", "layer_norm", "linear", "prelu"):
        assert set(backends[op].split("+")) <= {"reference", "cpp", "triton"}
        assert backends[op] in str(opt.coverage())
