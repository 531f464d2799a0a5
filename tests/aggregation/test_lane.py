"""The compiled lane: what it takes part in, and that it changes no bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from support.batches import ragged_batch
from support.lanes import WARM_UP, Batch, batches, compare, per_row, train
from torch import Tensor, nn

from pinet_fast.aggregation.lane import refusal
from pinet_fast.errors import PinetError
from pinet_fast.models import DIN, GRU4Rec, SASRec
from pinet_fast.models.layers import Embedding, LayerNorm

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")

V, D, K = 20, 6, 3


class Small(nn.Module):
    """One of each kind of boundary that the lane serves."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(V, D, padding_idx=0)
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, D)
        self.down = nn.Linear(D, D, bias=False)
        self.place = nn.Parameter(torch.randn(1, K, D))  # these of sums and products alone
        self.number = nn.Parameter(torch.randn(()))

    def forward(self, batch: Batch) -> Tensor:
        x = self.items(batch.ids(V, batch.num_rows))
        return self.down(x + F.gelu(self.up(self.norm(x))))


def small(model: Small, batch: Batch) -> Tensor:
    return per_row(model(batch))


def test_it_takes_all_settled_boundaries_of_a_usual_model() -> None:
    ours, theirs = compare(Small, batches(6), forward=small)
    assert ours.num_in_python == [4, 0, 0, 0, 0, 0]
    assert theirs.num_in_python == [4] * 6


def without_up_where_even(model: Small, batch: Batch) -> Tensor:
    x = model.items(batch.ids(V, batch.num_rows))
    h = model.norm(x)
    return per_row(model.down(x + (F.gelu(model.up(h)) if batch.seed % 2 else h)))


def without_items_where_even(model: Small, batch: Batch) -> Tensor:
    x = model.items(batch.ids(V, batch.num_rows)) if batch.seed % 2 else torch.ones(D)
    rows = batch.numbers(batch.num_rows, D) + x
    return per_row(model.down(model.norm(rows)))


@pytest.mark.parametrize("forward", [without_up_where_even, without_items_where_even])
def test_a_parameter_that_some_batches_do_not_use(
    forward: Callable[[Small, Batch], Tensor],
) -> None:
    ours, _ = compare(Small, batches(9), forward=forward)
    # What the last forward did not use has no leaf yet: Python makes it.
    assert max(ours.num_in_python[WARM_UP:]) <= 1


def looked_up(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Small, Batch], Tensor]:
    """Return the losses of one lookup for each row."""
    return lambda m, b: per_row(call(m.items.weight, b.ids(V, b.num_rows)))


def rows(batch: Batch) -> Tensor:
    return batch.numbers(batch.num_rows, D)


def several(batch: Batch) -> Tensor:
    """Return several rows of features a row, [N, K, D]."""
    return batch.numbers(batch.num_rows, K, D)


SERVED: dict[str, Callable[[Small, Batch], Tensor]] = {
    "linear": lambda m, b: per_row(F.linear(rows(b), m.up.weight, m.up.bias)),
    "layer_norm": lambda m, b: per_row(
        F.layer_norm(rows(b), (D,), m.norm.weight, m.norm.bias, 1e-3)
    ),
    "torch.layer_norm": lambda m, b: per_row(
        torch.layer_norm(rows(b), (D,), m.norm.weight, m.norm.bias, 1e-5)
    ),
    "embedding": looked_up(lambda e, ids: F.embedding(ids, e)),
    "padding": looked_up(lambda e, ids: F.embedding(ids, e, 3)),
    "padding from behind": looked_up(lambda e, ids: F.embedding(ids, e, -1)),
    "torch.embedding": looked_up(lambda e, ids: torch.embedding(e, ids, -1)),
    "torch.embedding, padding": looked_up(lambda e, ids: torch.embedding(e, ids, 3)),
    "torch.embedding, padding below 0": looked_up(lambda e, ids: torch.embedding(e, ids, -2)),
    "several ids a row": lambda m, b: per_row(m.items(b.ids(V, b.num_rows, 4))),
    "one id a row": lambda m, b: per_row(m.items(b.ids(V, b.num_rows, 1))),
    "no id a row": lambda m, b: per_row(m.norm(m.items(b.ids(V, b.num_rows, 0)).sum(1) + rows(b))),
    "strided ids": lambda m, b: per_row(m.items(b.ids(V, 2 * b.num_rows)[::2])),
    "expanded ids": lambda m, b: per_row(m.items(b.ids(V, 1).expand(b.num_rows))),
    "expanded rows": lambda m, b: per_row(m.norm(m.up(b.numbers(1, D).expand(b.num_rows, D)))),
    "users": lambda m, b: m.up(b.numbers(b.num_users, D)).sin().sum(1)[b.users_of_rows()],
    "a view of rows": lambda m, b: per_row(m.up(torch.cat([rows(b)] * 2, 1)[:, D:])),
    "a sum": lambda m, b: per_row(rows(b) + m.norm.weight),
    "a sum, the parameter first": lambda m, b: per_row(m.norm.weight + rows(b)),
    "torch.add": lambda m, b: per_row(torch.add(rows(b), m.norm.weight)),
    "Tensor.add": lambda m, b: per_row(rows(b).add(m.norm.weight)),
    "a product": lambda m, b: per_row(rows(b) * m.norm.weight),
    "a product, the parameter first": lambda m, b: per_row(m.norm.weight * rows(b)),
    "torch.mul": lambda m, b: per_row(torch.mul(m.norm.weight, rows(b))),
    "Tensor.mul": lambda m, b: per_row(m.norm.weight.mul(rows(b))),
    "positions": lambda m, b: per_row(several(b) + m.place),
    "a sum over positions": lambda m, b: per_row(several(b) + m.norm.weight),
    "a product over positions": lambda m, b: per_row(several(b) * m.norm.weight),
    "a number": lambda m, b: per_row(several(b) * m.number),
    "a number a row": lambda m, b: per_row(rows(b).sum(1) * m.number + m.number),
    "over what is repeated": lambda m, b: per_row(b.numbers(b.num_rows, 2, K, D) * m.place),
    "columns of one": lambda m, b: per_row(rows(b).unsqueeze(1) + m.norm.weight),
    "gates of positions": lambda m, b: per_row(several(b) * m.place),
    "a matrix for each row": lambda m, b: per_row(b.numbers(b.num_rows, D, D) + m.up.weight),
    "strided sums": lambda m, b: per_row(b.numbers(b.num_rows, D, K).transpose(1, 2) + m.place),
    "strides of sides": lambda m, b: per_row(
        (m.place * b.numbers(b.num_rows, D, K).transpose(1, 2)).view(b.num_rows, -1)
        + (m.place + b.numbers(b.num_rows, D, K).transpose(1, 2)).view(b.num_rows, -1)
    ),
    "a sum of expanded rows": lambda m, b: per_row(
        b.numbers(1, D).expand(b.num_rows, D) * m.norm.weight + m.norm.bias
    ),
    "a sum of users": lambda m, b: (
        (b.numbers(b.num_users, D) + m.norm.weight).sin().sum(1)[b.users_of_rows()]
    ),
    "sums and products of what layers make": lambda m, b: per_row(
        m.norm(m.items(b.ids(V, b.num_rows)) * m.norm.weight + m.norm.bias) * m.norm.weight
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SERVED)
def test_what_it_serves(what: str) -> None:
    ours, theirs = compare(Small, batches(6), forward=SERVED[what])
    # A lookup of nothing is left to Python.
    assert ours.num_in_python[WARM_UP:] == [what == "no id a row"] * 3
    assert min(theirs.num_in_python) > 0


LEFT: dict[str, Callable[[Small, Batch], Tensor]] = {
    "keywords": lambda m, b: per_row(F.linear(rows(b), m.up.weight, bias=m.up.bias)),
    "scale alone": lambda m, b: per_row(F.layer_norm(rows(b), (D,), m.norm.weight)),
    "a list of sizes": lambda m, b: per_row(
        torch.layer_norm(rows(b), [D], m.norm.weight, m.norm.bias, 1e-5)
    ),
    "a bias that is not ours": lambda m, b: per_row(F.linear(rows(b), m.up.weight, torch.ones(D))),
    "a weight of parameters": lambda m, b: per_row(F.linear(rows(b), m.up.weight * 2)),
    "a view of a weight": lambda m, b: per_row(F.linear(rows(b), m.up.weight[:3])),
    "three dimensions": lambda m, b: per_row(m.up(rows(b).unsqueeze(1))),
    "rows in another dimension": lambda m, b: m.up(rows(b).unsqueeze(0)).sin().sum((0, 2)),
    "ids in three dimensions": lambda m, b: per_row(m.items(b.ids(V, b.num_rows, 2, 1))),
    "ids of 32 bits": lambda m, b: per_row(m.items(b.ids(V, b.num_rows).int())),
    "a sparse gradient": lambda m, b: per_row(
        F.embedding(b.ids(V, b.num_rows), m.items.weight, sparse=True)
    ),
    "users chosen": lambda m, b: per_row(
        m.down((rows(b)[: b.num_users] * m.norm.weight.tanh())[b.users_of_rows()])
    ),
    "a factor": lambda m, b: per_row(torch.add(rows(b), m.norm.weight, alpha=2)),
    "a difference": lambda m, b: per_row(rows(b) - m.norm.weight),
    "a quotient": lambda m, b: per_row(rows(b) / m.norm.weight.abs()),
    "a sum in place": lambda m, b: per_row(rows(b).clone().add_(m.norm.weight)),
    "a keyword": lambda m, b: per_row(torch.add(rows(b), other=m.norm.weight)),
    "columns": lambda m, b: per_row(rows(b).unsqueeze(2) + m.norm.weight),
    "one number a row": lambda m, b: per_row(rows(b)[:, :1] + m.norm.weight),
    "numbers of rows": lambda m, b: per_row(rows(b).sum(1) * m.norm.weight[0]),
    "rows of another type": lambda m, b: per_row(rows(b).double() + m.norm.weight).float(),
    "rows behind positions": lambda m, b: (
        (several(b).transpose(0, 1) + m.norm.weight).sin().sum((0, 2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT)
def test_what_it_leaves_to_python(what: str) -> None:
    sgd = torch.optim.SGD
    ours, theirs = compare(
        Small, batches(6), forward=LEFT[what], optimizer=lambda named: sgd(named, lr=0.1)
    )
    assert ours.num_in_python == theirs.num_in_python


@pytest.mark.parametrize("rule", ["agreement", "balanced", "mgda", "pcgrad"])
@pytest.mark.parametrize("num_strata", range(1, 6))
def test_rules_and_numbers_of_strata(rule: str, num_strata: int) -> None:
    ours, _ = compare(
        Small, batches(5, num_strata=num_strata), forward=small, rule=rule, num_strata=num_strata
    )
    # One stratum has no pair to prove: nothing is ever settled.
    assert ours.num_in_python[WARM_UP:] == ([4, 4] if num_strata == 1 else [0, 0])


ODD = {
    "one row": Batch([1], [1]),
    "one user": Batch([2], [5]),
    "one stratum": Batch([1, 1, 1], [2, 1, 3]),
    "an absent stratum": Batch([2, 0, 2], [2, 1, 3]),
    "sorted": Batch([0, 1, 1, 2], [1, 2, 1, 3]),
    "as many events as users": Batch([2, 0, 1], [1, 1, 1]),
    "as many events as users, some without": Batch([2, 0, 1], [0, 2, 1]),
    "as many events as features": Batch([2, 0, 1], [3, 2, 1]),
    "as many users as features": Batch([2, 0, 1, 0, 1, 2], [3, 2, 1, 1, 1, 1]),
    "users without events": Batch([2, 0, 1, 0], [0, 3, 0, 2]),
    "no event at all": Batch([2, 0, 1], [0, 0, 0]),
    "no user at all": Batch([], []),
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_batch_among_others(what: str) -> None:
    steps = batches(7)
    steps[4] = ODD[what]
    ours, _ = compare(Small, steps, forward=small, catches=PinetError)
    assert ours.num_in_python[-1] == 0


@pytest.mark.parametrize("is_first", [True, False])
def test_as_many_positions_as_users(is_first: bool) -> None:
    """Where a dimension beside the rows is as long as theirs, Python asks the graph."""
    steps = [Batch([2, 0, 1, *extra], seed=i) for i, extra in enumerate([[0], [1, 1], [2], [], []])]

    def forward(model: Small, batch: Batch) -> Tensor:
        x = several(batch)
        if not is_first:
            x = model.up(rows(batch)).unsqueeze(1) + x
        return per_row((x + model.place) * model.norm.weight)

    ours, _ = compare(Small, steps, forward=forward)
    # Positions are the parameter's own dimension in the sum, and are not in the product.
    assert ours.num_in_python[2:] == ([0, 1, 1] if is_first else [1, 2, 2])


def test_rows_may_be_of_users_and_events_at_once() -> None:
    def forward(model: Small, batch: Batch) -> Tensor:
        of_users = torch.tanh(model.up(batch.numbers(batch.num_users, D)))
        x = model.items(batch.ids(V, batch.num_rows)) + of_users[batch.users_of_rows()]
        return per_row(model.up(model.norm(x)))

    ours, _ = compare(Small, batches(6), forward=forward)
    assert ours.num_in_python[WARM_UP:] == [0] * 3


def test_more_uses_in_one_batch_than_were_settled() -> None:
    def forward(model: Small, batch: Batch) -> Tensor:
        x = model.items(batch.ids(V, batch.num_rows))
        for _ in range(3 if batch.seed in (4, 6) else 1):
            x = x + model.up(model.norm(x)).tanh()
        return per_row(x)

    ours, _ = compare(Small, batches(8), forward=forward)
    assert ours.num_in_python == [3, 0, 0, 0, 4, 0, 0, 0]


def test_kernels_are_counted() -> None:
    ours = train(Small, batches(6), on=True, forward=small)
    before, after = (dict(ours.entries[i]["calls of kernels"]) for i in (-2, -1))
    assert after["stratified_linear_backward", "cpp"] == (
        before["stratified_linear_backward", "cpp"] + 2
    )
    assert after["stratified_norm_backward", "cpp"] == before["stratified_norm_backward", "cpp"] + 1


def test_layers_of_ours() -> None:
    class Ours(Small):
        def __init__(self) -> None:
            super().__init__()
            self.items = Embedding(V, D, padding_idx=0)
            self.norm = LayerNorm(D)

    ours, _ = compare(Ours, batches(6), forward=small)
    assert ours.num_in_python == [4, 0, 0, 0, 0, 0]


MODELS = {
    "sasrec": lambda: SASRec(V, dim=8, num_heads=2, max_len=8, dropout=0.2),
    "sasrec, post-norm": lambda: SASRec(V, dim=8, max_len=8, norm="post", loss="bce", tied=False),
    "gru4rec": lambda: GRU4Rec(V, dim=4, num_layers=2),
    "din": lambda: DIN(V, dim=3, unit=4, layers=(5, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_ours(name: str) -> None:
    def forward(model: Any, batch: Batch) -> Tensor:
        assert batch.lengths is not None
        losses: Tensor = model(
            ragged_batch(batch.strata, batch.lengths, num_strata=3, num_items=V, seed=batch.seed)
        )
        return losses

    ours, theirs = compare(MODELS[name], batches(6), forward=forward)
    assert ours.num_in_python[-1] < theirs.num_in_python[-1]
