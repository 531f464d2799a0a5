"""Layers of ours are torch's, without the Python in front of their functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.boundaries import assert_exact, assert_ruled, leaf, per_row
from torch import Tensor, nn

from pinet_fast.models.layers import Embedding, LayerNorm

if TYPE_CHECKING:
    from collections.abc import Callable

V, D, S = 9, 5, 4
IDS = torch.tensor([3, 0, 0, 3, 3, 1, 3])
ITEMS = torch.tensor([1, 0, 8, 8, 2, 1, 0])


def same_gradients(ours: nn.Module, theirs: nn.Module, *args: Tensor) -> None:
    ours.load_state_dict(theirs.state_dict())
    a, b = ours(*args), theirs(*args)
    assert torch.equal(a, b)
    a.sin().sum().backward()
    b.sin().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert mine.grad.layout == other.grad.layout
        assert torch.equal(mine.grad.to_dense(), other.grad.to_dense())


@pytest.mark.parametrize(
    "options", [{}, {"eps": 1e-12}, {"bias": False}], ids=["plain", "eps", "no bias"]
)
@pytest.mark.parametrize("shape", [(D,), (2, D)])
def test_layer_norm_is_that_of_torch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    same_gradients(
        LayerNorm(shape, **options), nn.LayerNorm(shape, **options), leaf(7, 2, D).float()
    )


def test_layer_norm_without_parameters() -> None:
    x = torch.randn(7, D)
    norm = LayerNorm(D, elementwise_affine=False)
    assert torch.equal(norm(x), F.layer_norm(x, (D,)))


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 0}, {"padding_idx": -1}, {"sparse": True}, {"max_norm": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("ids", [ITEMS, ITEMS.view(7, 1), ITEMS.int(), ITEMS[:0]], ids=str)
def test_embedding_is_that_of_torch(ids: Tensor, options: dict[str, Any]) -> None:
    same_gradients(Embedding(V, D, **options), nn.Embedding(V, D, **options), ids)


def test_compiled_layers_are_those_of_torch() -> None:
    """Compilers know the functions of torch.nn.functional best."""
    norm, table = LayerNorm(D), Embedding(V, D)
    run = torch.compile(lambda ids: norm(table(ids)), backend="eager", fullgraph=True)
    assert torch.equal(run(ITEMS), norm(table(ITEMS)))


# The rules of the functions they call ------------------------------------------------------------

Norm = "Callable[[Tensor, Tensor | None, Tensor | None], Tensor]"

NORMS: dict[str, Norm] = {
    "as the layer calls it": lambda x, w, b: torch.layer_norm(x, (D,), w, b, 1e-5),
    "by name": lambda x, w, b: torch.layer_norm(
        input=x, normalized_shape=[D], weight=w, bias=b, eps=1e-5, cudnn_enable=False
    ),
    "in short": lambda x, w, b: torch.layer_norm(x, (D,), w, b),
    "scale alone": lambda x, w, b: torch.layer_norm(x, (D,), w),
    "shift alone": lambda x, w, b: torch.layer_norm(x, (D,), None, b),
}


@pytest.mark.parametrize("how", NORMS)
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 1, 0, 4, 1, 2, 1])], ids=str)
def test_torch_layer_norm(how: str, lengths: Tensor | None) -> None:
    x, w, b = leaf(7 if lengths is None else 12, D), leaf(D), leaf(D)
    used = {"scale alone": [w], "shift alone": [b]}.get(how, [w, b])
    coverage = assert_exact(
        lambda: per_row(NORMS[how](x, w, b)), used, IDS, S, below=[x], lengths=lengths
    )
    assert_ruled(coverage, "layer_norm")


LOOKUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as the layer calls it": lambda e, ids: torch.embedding(e, ids, -1),
    "padding": lambda e, ids: torch.embedding(e, ids, 0),
    "by name": lambda e, ids: torch.embedding(
        weight=e, indices=ids, padding_idx=8, scale_grad_by_freq=False, sparse=False
    ),
    "in short": lambda e, ids: torch.embedding(e, ids),
    "padding below 0": lambda e, ids: torch.embedding(e, ids, -2),
    "padding past the last": lambda e, ids: torch.embedding(e, ids, V + 2),
}  # fmt: skip


@pytest.mark.parametrize("how", LOOKUPS)
@pytest.mark.parametrize("ids", [ITEMS, torch.stack([ITEMS, ITEMS.flip(0)], 1)], ids=["1-D", "2-D"])
def test_torch_embedding(how: str, ids: Tensor) -> None:
    table = leaf(V, D)
    coverage = assert_exact(lambda: per_row(LOOKUPS[how](table, ids)), [table], IDS, S)
    assert_ruled(coverage, "embedding")


@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_both_layers_on_drawn_batches(
    data: st.DataObject, num_strata: int, width: int, is_ragged: bool
) -> None:
    strata = torch.tensor(
        data.draw(st.lists(st.integers(0, num_strata - 1), min_size=1, max_size=6))
    )
    lengths = None
    count = len(strata)
    if is_ragged:
        sizes = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
        lengths = torch.tensor([max(sizes[0], 1), *sizes[1:]])
        count = int(lengths.sum())
    table, norm = Embedding(V, width, padding_idx=0).double(), LayerNorm(width).double()
    items = torch.tensor(data.draw(st.lists(st.integers(0, V - 1), min_size=count, max_size=count)))
    x = leaf(count, width)
    assert_exact(
        lambda: per_row(norm(table(items) + x)),
        [*table.parameters(), *norm.parameters()],
        strata, num_strata, below=[x], lengths=lengths, tolerance=1e-8,
    )  # fmt: skip
