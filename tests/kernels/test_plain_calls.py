"""Ops called where nobody looks on skip the dispatcher, and compute the same."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pinet_fast import kernels
from pinet_fast.kernels._library import is_plain

ROWS, WIDE, STRATA = 7, 3, 2
IDS = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def gradients():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(STRATA, 4, WIDE, generator=generator),
        torch.randn(STRATA, 5, generator=generator),
    ]


def combined():
    outs = [torch.empty(4, WIDE), torch.empty(5)]
    kernels.stratum_combine(gradients(), torch.tensor([0.25, 0.75]).double(), outs)
    return outs


def added():
    dense = torch.ones(STRATA, 4, WIDE)
    kernels.stratified_embedding_add(dense, [IDS % 4], [IDS], [torch.ones(ROWS, WIDE)])
    return dense


def rows():
    return torch.arange(ROWS * WIDE, dtype=torch.float32).view(ROWS, WIDE)


CALLS = {
    "dropout_mask": lambda: kernels.dropout_mask(rows(), 0.5, count=2, seed=1),
    "stratified_linear": lambda: kernels.stratified_linear_backward(
        rows(), rows(), torch.ones(WIDE, WIDE), IDS, (0, 3, ROWS)
    ),
    "stratified_norm": lambda: kernels.stratified_norm_backward(
        rows(), rows(), torch.ones(ROWS), torch.ones(ROWS), torch.ones(WIDE), IDS, STRATA
    ),
    "stratum_sums": lambda: kernels.stratum_sums(rows(), IDS, STRATA),
    "stratum_gram": lambda: kernels.stratum_gram(gradients()),
    "stratum_solve": lambda: kernels.stratum_solve(torch.eye(STRATA).double(), "balanced"),
    "stratum_combine": combined,
    "stratified_embedding": lambda: kernels.stratified_embedding_reduce(
        [IDS % 4], [IDS], [torch.ones(ROWS, WIDE)], STRATA, 4
    ),
    "stratified_embedding, added": added,
}


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_call_is_the_op(monkeypatch, name):
    module = sys.modules[f"pinet_fast.kernels.{name.partition(',')[0]}.op"]
    asked = []

    def noted(tensor):
        asked.append(is_plain(tensor))
        return asked[-1]

    monkeypatch.setattr(module, "is_plain", noted)
    plain = CALLS[name]()
    assert asked == [True]
    with Seen() as seen:
        dispatched = CALLS[name]()
    assert asked == [True, False]
    assert any(op.startswith("pinet::") for op in seen.names)
    torch.testing.assert_close(plain, dispatched, rtol=0, atol=0, equal_nan=True)


def test_who_looks_on():
    x = torch.ones(2)
    assert is_plain(x)
    assert is_plain(torch.nn.Parameter(x))
    assert not is_plain(x.to("meta"))
    assert not is_plain(x.as_subclass(type("Own", (torch.Tensor,), {})))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert not is_plain(x)
    seen = []
    torch.func.vmap(lambda row: (seen.append(is_plain(x)), row)[1])(x)
    assert seen == [False]
