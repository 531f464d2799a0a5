"""Item tables: bags, indexing, sparse gradients and the optimizers that want them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.one_hot import stratum_gradients
from support.oracle import autograd_stratum_gradients
from torch import Tensor, nn

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.errors import BoundaryError, CheckpointError, ConfigError
from pinet_fast.rules import Backdoor

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2])
B, V, D, S = 7, 9, 4, 3


def assert_table_exact(losses: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
    expected = autograd_stratum_gradients(losses, IDS, parameters, S)

    def run(opt: GradientAggregator) -> None:
        with opt.stratify(IDS):
            values = losses()
        opt.backward(values)

    for got, theirs in zip(stratum_gradients(parameters, S, run), expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-12)


BAG_CALLS: dict[str, dict[str, Any]] = {
    "two dimensions": {},
    "offsets": {"ragged": True},
    "last offset": {"ragged": True, "include_last_offset": True},
    "padding": {"padding_idx": 1},
    "ragged padding": {"ragged": True, "padding_idx": -2},
    "sparse": {"sparse": True},
    "sparse padding": {"sparse": True, "padding_idx": 1, "ragged": True},
}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("call", BAG_CALLS)
def test_bags_are_exact(mode: str, call: str) -> None:
    options = dict(BAG_CALLS[call])
    if mode == "max" and options.get("sparse"):
        pytest.skip("torch has no sparse maxima")
    ragged = options.pop("ragged", False)
    torch.manual_seed(1)
    table = nn.Parameter(torch.randn(V, D, dtype=torch.float64))
    scores = torch.randn(B, D, dtype=torch.float64)
    if ragged:
        sizes = torch.tensor([3, 0, 4, 1, 2, 5, 1])  # a bag without items among them
        items = torch.randint(V, (int(sizes.sum()),))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        options["offsets"] = offsets if options.get("include_last_offset") else offsets[:-1]
    else:
        items = torch.randint(V, (B, 5))

    def losses() -> Tensor:
        bags = F.embedding_bag(items, table, mode=mode, **options)
        return (bags * scores).sum(1).square()

    assert_table_exact(losses, [table])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_weighted_bags_of_any_size(data: st.DataObject) -> None:
    sizes = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=B, max_size=B)))
    total = int(sizes.sum())
    items = torch.tensor(
        data.draw(st.lists(st.integers(0, V - 1), min_size=total, max_size=total)),
        dtype=torch.int64,
    )
    torch.manual_seed(2)
    table = nn.Parameter(torch.randn(V, D, dtype=torch.float64))
    net = nn.Linear(1, 1).double()
    raw = torch.randn(total, 1, dtype=torch.float64, requires_grad=True)
    offsets = sizes.cumsum(0) - sizes
    scores = torch.randn(B, D, dtype=torch.float64)

    def losses() -> Tensor:
        # Weights with a gradient of their own, of a tensor that is not the optimizer's.
        bags = F.embedding_bag(
            items, table, offsets, mode="sum", per_sample_weights=raw.tanh().squeeze(1)
        )
        return net((bags * scores).sum(1, keepdim=True)).squeeze(1).square()

    assert_table_exact(losses, [table, *net.parameters()])
    raw.grad = None
    (expected,) = torch.autograd.grad(
        torch.stack([losses()[s == IDS].mean() for s in range(S)]).sum(), raw
    )
    opt = GradientAggregator(
        torch.optim.SGD([table, *net.parameters()], lr=0.1), "agreement", num_strata=S
    )
    with opt.stratify(IDS):
        values = losses()
    opt.backward(values)
    assert raw.grad is not None
    torch.testing.assert_close(raw.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["index", "index 2d", "index_select", "negative", "bias"])
def test_a_parameter_indexed_by_ids_is_a_lookup(how: str) -> None:
    torch.manual_seed(3)
    table = nn.Parameter(torch.randn(V, D, dtype=torch.float64))
    bias = nn.Parameter(torch.randn(V, dtype=torch.float64))
    items = torch.randint(V, (B, 2))

    def losses() -> Tensor:
        if how == "index 2d":
            return table[items].square().sum((1, 2))
        if how == "index_select":
            return torch.index_select(table, 0, items[:, 0]).square().sum(1)
        if how == "negative":
            return table[items[:, 0] - V].square().sum(1)
        if how == "bias":
            return bias[items].sum(1).square() + table[items[:, 0]].sum(1)
        return table[items[:, 0]].square().sum(1)

    assert_table_exact(losses, [table, bias] if how == "bias" else [table])
    opt = GradientAggregator(torch.optim.SGD([table, bias], lr=0.1), "agreement")
    with opt.stratify(IDS):
        values = losses()
    opt.backward(values)
    assert not opt.coverage().sliced
    assert {entry.op for entry in opt.coverage()} == {"embedding"}


def test_counting_options_are_refused() -> None:
    table = nn.EmbeddingBag(V, D, max_norm=1.0)
    opt = GradientAggregator(torch.optim.SGD(table.parameters(), lr=0.1), "agreement")
    with pytest.raises(BoundaryError, match="max_norm"), opt.stratify(IDS):
        table(torch.randint(V, (B, 3)))


class Sparse(nn.Module):
    """A sparse table and a dense network."""

    def __init__(self, *, bag: bool, padding_idx: int | None = 0) -> None:
        super().__init__()
        make = nn.EmbeddingBag if bag else nn.Embedding
        self.table = make(V, D, sparse=True, padding_idx=padding_idx)
        self.net = nn.Linear(D, 1)

    def forward(self, items: Tensor) -> Tensor:
        rows = self.table(items)
        rows = rows if rows.dim() == 2 else rows.mean(1)
        return self.net(rows.tanh()).squeeze(1).square()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.net.parameters(), lr=0.05),
            torch.optim.SparseAdam(self.table.parameters(), lr=0.05),
        ]


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("mode", ["one-pass", "exact"])
def test_adam_and_sparse_adam_step_as_without_the_wrapper(bag: bool, mode: Any) -> None:
    """One stratum: the same weights as the two bare optimizers, padding rows untouched."""
    torch.manual_seed(0)
    model = Sparse(bag=bag).double()
    twin = copy.deepcopy(model)
    opt = GradientAggregator(
        model.optimizers(), Backdoor([1.0]), mode=mode, report_every=1, num_strata=1
    )
    bare = twin.optimizers()
    for step in range(4):
        items = torch.randint(V, (B, 3), generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        with opt.stratify(torch.zeros(B, dtype=torch.int64)):
            losses = model(items)
        opt.backward(losses)
        assert model.table.weight.grad is not None
        assert model.table.weight.grad.is_sparse
        opt.step()
        for one in bare:
            one.zero_grad()
        twin(items).mean().backward()
        for one in bare:
            one.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["agreement", "mgda", "signagreement", "backdoor"])
def test_every_tier_leaves_a_sparse_gradient_of_touched_rows(rule: str) -> None:
    model = Sparse(bag=False)
    opt = GradientAggregator(model.optimizers(), rule)
    items = torch.tensor([[1, 2, 2]] * 4 + [[0, 2, 5]] * 3)
    with opt.stratify(IDS):
        losses = model(items)
    opt.backward(losses)
    grad = model.table.weight.grad
    assert grad is not None
    assert grad.is_sparse
    assert grad.coalesce()._indices()[0].tolist() == [1, 2, 5]  # no padding row


def test_a_table_used_densely_too_gets_a_dense_gradient() -> None:
    """As autograd does: sparse plus dense is dense."""
    torch.manual_seed(0)
    table = nn.Embedding(V, D, sparse=True).double()
    items = torch.randint(V, (B,))
    parameters = list(table.parameters())

    def losses() -> Tensor:
        return F.cross_entropy(table(items).tanh() @ table.weight.T, items, reduction="none")

    assert_table_exact(losses, parameters)


def test_accumulated_sparse_gradients_keep_both_batches() -> None:
    model = Sparse(bag=False, padding_idx=None)
    opt = GradientAggregator(model.optimizers(), "agreement")
    for first in (1, 4):
        with opt.stratify(IDS):
            losses = model(torch.full((B, 2), first))
        opt.backward(losses)
    grad = model.table.weight.grad
    assert grad is not None
    assert grad.coalesce()._indices()[0].tolist() == [1, 4]


def test_state_of_several_optimizers_round_trips() -> None:
    torch.manual_seed(0)
    model = Sparse(bag=False)
    opt = GradientAggregator(model.optimizers(), "agreement")
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)

    def step(on: GradientAggregator, net: Sparse) -> None:
        on.zero_grad()
        with on.stratify(IDS):
            losses = net(torch.arange(B * 2).view(B, 2) % V)
        on.backward(losses)
        on.step()

    step(opt, model)
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.025, 0.025]
    assert [o.param_groups[0]["lr"] for o in opt.inner.optimizers] == [0.025, 0.025]  # type: ignore[attr-defined]
    twin = copy.deepcopy(model)
    again = GradientAggregator(twin.optimizers(), "agreement")
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    both, copied = copy.deepcopy((opt, model))  # one deepcopy: parameters stay those of the model
    for on, net in ((opt, model), (again, twin), (both, copied)):
        step(on, net)
    for other in (twin, copied):
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    with pytest.raises(CheckpointError, match="groups of"):
        GradientAggregator([torch.optim.Adam(model.net.parameters())]).load_state_dict(
            opt.state_dict()
        )


def test_misuse_of_several_optimizers() -> None:
    model = Sparse(bag=False)
    with pytest.raises(ConfigError, match="at least one"):
        GradientAggregator([])
    with pytest.raises(ConfigError, match="share a parameter"):
        GradientAggregator([torch.optim.Adam(model.net.parameters())] * 2)
    with pytest.raises(ConfigError, match="got str"):
        GradientAggregator(["adam"])  # type: ignore[list-item]
    opt = GradientAggregator(model.optimizers())
    with pytest.raises(ConfigError, match="several optimizers"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    opt.inner.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(1))]})  # type: ignore[attr-defined]
    with opt.stratify(IDS):
        losses = model(torch.ones(B, 2, dtype=torch.int64))
    opt.backward(losses)
    assert len(opt.param_groups) == 3
