"""The gradients of lookups in an item table: merged by the op, by torch, and not told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from pinet_fast.aggregation.stratum_gradient import distinct_rows
from pinet_fast.kernels import stratified_embedding_add, stratified_embedding_reduce
from pinet_fast.kernels.stratified_embedding import cost

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# Three lookups of a batch in the table of MovieLens-1M's size.
LOOKUPS, IDS, ROWS, STRATA, WIDTH = 3, 6400, 3417, 4, 64


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["uniform", "zipf"])
def lookups(request: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Ids as evenly spread as can be, or as popular as items are."""
    torch.manual_seed(0)
    popularity = torch.ones(ROWS) if request.param == "uniform" else 1 / torch.arange(1.0, ROWS + 1)
    order = torch.randperm(ROWS)
    indices = [
        torch.stack(
            [torch.randint(STRATA, (IDS,)), order[torch.multinomial(popularity, IDS, True)]]
        )
        for _ in range(LOOKUPS)
    ]
    return [i[1] for i in indices], [i[0] for i in indices], [
        torch.randn(IDS, WIDTH) for _ in range(LOOKUPS)
    ]  # fmt: skip


def merge_by_torch(
    ids: list[Tensor], strata: list[Tensor], grads: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the aggregation did before the op: marking, concatenating and index_add_."""
    rows, position = distinct_rows(torch.cat(ids), ROWS)
    num_touched = rows.numel()
    place = torch.cat(strata) * num_touched + position
    values = torch.cat(grads)
    compact = values.new_zeros((STRATA * num_touched, WIDTH)).index_add_(0, place, values)
    touched = torch.zeros(STRATA * num_touched, dtype=torch.bool)
    touched[place] = True
    return rows, compact.view(STRATA, num_touched, WIDTH), touched.view(STRATA, num_touched)


def test_reduce_over_torch(lookups: Any, paired: Callable[..., Any], benchmark: Any) -> None:
    benchmark.group = "embedding"
    for mine, theirs in zip(
        stratified_embedding_reduce(*lookups, STRATA, ROWS), merge_by_torch(*lookups), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    paired(
        lambda: stratified_embedding_reduce(*lookups, STRATA, ROWS),
        lambda: merge_by_torch(*lookups),
        rounds=100,
    )


def test_reduce_over_a_backward_that_knows_no_strata(
    lookups: Any, paired: Callable[..., Any], benchmark: Any
) -> None:
    """Dense backward of the same lookups: a gradient [V, d] a lookup, and their sum."""
    benchmark.group = "embedding"
    ids, _, grads = lookups

    def backward() -> Tensor:
        return sum(  # type: ignore[return-value]
            torch.ops.aten.embedding_dense_backward(g, i, ROWS, -1, False)
            for i, g in zip(ids, grads, strict=True)
        )

    table = torch.zeros(ROWS, WIDTH, requires_grad=True)
    for i, g in zip(ids, grads, strict=True):
        F.embedding(i, table).backward(g)
    torch.testing.assert_close(backward(), table.grad)
    paired(lambda: stratified_embedding_reduce(*lookups, STRATA, ROWS), backward, rounds=100)


def test_reduce_over_copy(
    lookups: Any, paired: Callable[..., Any], benchmark: Any, capsys: Any
) -> None:
    """Against a copy, into new memory as the op's results are, of as many bytes in all."""
    benchmark.group = "embedding"
    rows, _, _ = stratified_embedding_reduce(*lookups, STRATA, ROWS)
    num_bytes = cost(LOOKUPS * IDS, rows.numel(), STRATA, WIDTH, 4)[1]
    source = torch.randn(num_bytes // 8)
    result = paired(
        lambda: stratified_embedding_reduce(*lookups, STRATA, ROWS),
        source.clone,
        rounds=100,
    )
    benchmark.extra_info["share_of_copy_bandwidth"] = 1 / result.ratio
    if not benchmark.disabled:
        with capsys.disabled():
            print(f"    {1 / result.ratio:.2f} of copy bandwidth")


def test_add_over_torch(lookups: Any, paired: Callable[..., Any], benchmark: Any) -> None:
    """Into dense stratum gradients, which both change in place."""
    benchmark.group = "embedding"
    ids, strata, grads = lookups
    mine, theirs = torch.zeros(2, STRATA, ROWS, WIDTH)

    def index_add() -> None:
        place = torch.cat(strata) * ROWS + torch.cat(ids)
        theirs.view(-1, WIDTH).index_add_(0, place, torch.cat(grads))

    stratified_embedding_add(mine, ids, strata, grads)
    index_add()
    torch.testing.assert_close(mine, theirs)
    paired(lambda: stratified_embedding_add(mine, ids, strata, grads), index_add, rounds=100)
