"""What every boundary must bear: several uses, computed parameters, autocast, any kind of rows.

And what the rules leave to the slice rule, or refuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from support.boundaries import assert_exact, assert_ruled, leaf, per_row

from pinet_fast import GradientAggregator
from pinet_fast.errors import BoundaryError, RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

S = 4


def twice(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *ps: call(x, *ps) + call(0.5 * x, *ps)


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], list[tuple[int, ...]]]] = {
    # op: (call, sizes of the rows behind the users, sizes of the parameters)
    "div": (lambda x, p: x / (p * p + 1), (5,), [(5,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (4, 5), [(4,), (4,)]),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), (4, 5), [(3, 4, 3), (3,)]),
    "bilinear": (lambda x, w, b: F.bilinear(x, x.cos(), w, b), (5,), [(3, 5, 5), (3,)]),
    "einsum": (lambda x, w: torch.einsum("bd,de->be", x, w), (5,), [(5, 3)]),
    "einsum (batched)": (lambda x, w: torch.einsum("bhd,hde->bhe", x, w), (2, 5), [(2, 5, 3)]),
    "bmm": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (2, 5), [(2, 5, 3)]),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_weight_used_twice(op: str) -> None:
    call, sizes, shapes = CALLS[op]
    ids = torch.tensor([3, 0, 0, 3, 3, 1, 3])
    x, ps = leaf(7, *sizes), [leaf(*shape) for shape in shapes]
    coverage = assert_exact(lambda: per_row(twice(call)(x, *ps)), ps, ids, S, below=[x])
    assert_ruled(coverage, op, 2)


@pytest.mark.parametrize("op", CALLS)
def test_parameters_that_are_computed(op: str) -> None:
    call, sizes, shapes = CALLS[op]
    ids = torch.tensor([3, 0, 0, 3, 3, 1, 3])
    x, ps = leaf(7, *sizes), [leaf(*shape) for shape in shapes]
    coverage = assert_exact(
        lambda: per_row(call(x, *(1 + p.tanh() for p in ps))), ps, ids, S, below=[x]
    )
    assert_ruled(coverage, op)


def test_einsum_of_a_transpose() -> None:
    x, w = leaf(7, 3), leaf(5, 3)
    ids = torch.tensor([3, 0, 0, 3, 3, 1, 3])
    coverage = assert_exact(
        lambda: per_row(torch.einsum("bd,de->be", x, w.T)), [w], ids, S, below=[x]
    )
    assert_ruled(coverage, "einsum")


@pytest.mark.parametrize("op", CALLS)
def test_ragged_rows(op: str) -> None:
    """Events of users one after another; a user without any."""
    call, sizes, shapes = CALLS[op]
    ids, lengths = torch.tensor([2, 0, 3, 0, 2]), torch.tensor([3, 1, 0, 4, 1])
    x, ps = leaf(9, *sizes), [leaf(*shape) for shape in shapes]
    coverage = assert_exact(lambda: per_row(call(x, *ps)), ps, ids, S, below=[x], lengths=lengths)
    assert {(e.op, e.rule, e.rows) for e in coverage} == {(op, "boundary", "events")}


@pytest.mark.parametrize("op", CALLS)
def test_declared_rows(op: str) -> None:
    """Heads in front of users, [H * B, ...]: neither sizes nor the graph tell."""
    call, sizes, shapes = CALLS[op]
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    x, ps = leaf(3 * 7, *sizes), [leaf(*shape) for shape in shapes]
    dim = 1 if op == "bmm" else 0
    rows = {f"p{i}": (dim, ids.repeat(3)) for i in range(len(ps))}

    def losses() -> Tensor:
        return call(x, *ps).sin().reshape(3, 7, -1).sum((0, 2))

    coverage = assert_exact(losses, ps, ids, S, below=[x], rows=rows)
    assert {(e.op, e.rule, e.rows) for e in coverage} == {(op, "boundary", "declared")}


@pytest.mark.parametrize("op", CALLS)
def test_autocast(op: str) -> None:
    """The forward is bit-identical; each product of the gradient rounds to 8 bits."""
    call, sizes, shapes = CALLS[op]
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    x = leaf(7, *sizes, dtype=torch.float32)
    ps = [leaf(*shape, dtype=torch.float32) for shape in shapes]

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return per_row(call(x, *ps).float())

    coverage = assert_exact(losses, ps, ids, S, below=[x], tolerance=3 * 2**-8)
    assert_ruled(coverage, op)


@pytest.mark.parametrize("op", CALLS)
def test_float32_in_one_stratum_is_the_ordinary_gradient(op: str) -> None:
    call, sizes, shapes = CALLS[op]
    x = leaf(9, *sizes, dtype=torch.float32)
    ps = [leaf(*shape, dtype=torch.float32) for shape in shapes]
    ids = torch.zeros(9, dtype=torch.int64)
    assert_exact(lambda: per_row(call(x, *ps)), ps, ids, 1, below=[x], tolerance=1e-5)


# Calls that the rules do not cover: sliced as before, and exact.


def expanded(w: Tensor, users: int) -> Tensor:
    return w.expand(users, *w.shape)


SLICED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "rounded quotient": (lambda x, p: torch.div(x.exp(), p, rounding_mode="floor") + x * p, (3,)),
    "quotient of an expanded parameter": (lambda x, p: x / expanded(p, 7), (11, 3)),
    "implicit einsum": (lambda x, w: torch.einsum("bld,de", x, w), (3, 5)),
    "einsum of three": (lambda x, w: torch.einsum("bld,de,e->ble", x, w, w[0]), (3, 5)),
    "einsum with a diagonal": (lambda x, w: torch.einsum("bld,dd->bld", x, w), (3, 3)),
    "einsum that sums over positions": (lambda x, w: torch.einsum("bld,de->be", x, w), (3, 5)),
    "einsum that broadcasts": (lambda x, w: torch.einsum("bld,de->ble", x, w), (1, 5)),
    "bmm of an expanded parameter": (lambda x, w: torch.bmm(x, expanded(w, 7)), (3, 5)),
    "einsum of an expanded parameter": (
        lambda x, w: torch.einsum("bld,bde->ble", x, expanded(w, 7)),
        (3, 5),
    ),
    "bilinear with an expanded parameter": (
        lambda x, w: F.bilinear(x, expanded(w[0, 0, :2], 7)[:, None].expand(7, 11, 2), w),
        (4, 3, 2),
    ),
}


@pytest.mark.parametrize("name", SLICED)
def test_what_the_rules_do_not_cover_is_sliced(name: str) -> None:
    call, shape = SLICED[name]
    x, w = leaf(7, 11, 3), leaf(*shape)
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    coverage = assert_exact(lambda: per_row(call(x, w)), [w], ids, S, below=[x])
    assert coverage.sliced


@pytest.mark.parametrize("name", ["group_norm", "stride with same", "mixed rows", "einsum", "bmm"])
def test_what_cannot_be_right_is_refused(name: str) -> None:
    x, w = leaf(7, 3), leaf(3)
    kernel = leaf(2, 3, 4)
    opt = GradientAggregator(torch.optim.SGD([w, kernel], lr=0.1), "agreement")
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    if name == "group_norm":  # one value a channel
        with pytest.raises(BoundaryError, match="more than 1 value"), opt.stratify([0]):
            F.group_norm(leaf(1, 3), 3, w)
    elif name == "stride with same":
        with pytest.raises(BoundaryError, match="padding='same'"), opt.stratify(ids):
            torch.conv1d(leaf(7, 3, 11), kernel, stride=2, padding="same")
    elif name == "mixed rows":
        with pytest.raises(RowLayoutError, match="mixes or drops"), opt.stratify(ids):
            torch.einsum("bd,d->d", x, w)
    elif name == "einsum":  # as many positions as users
        with pytest.raises(RowLayoutError, match="undecided"), opt.stratify(ids):
            torch.einsum("bld,ed->ble", leaf(7, 7, 4), kernel[0])
    else:  # a parameter expanded over users has no values of its own for each of them
        with pytest.raises(RowLayoutError, match="undecided"), opt.stratify(ids):
            torch.bmm(leaf(7, 7, 3), expanded(kernel[0], 7))


def test_sizes_that_only_look_like_rows_do_not_disturb() -> None:
    """Channels, positions or features as many as users: a convolution knows where rows are."""
    ids = torch.tensor([2, 0, 1])
    x, w, scale = leaf(3, 3, 3), leaf(3, 3, 1), leaf(3)

    def losses() -> Tensor:
        return per_row(F.group_norm(torch.conv1d(x, w), 1, scale))

    coverage = assert_exact(losses, [w, scale], ids, S, below=[x])
    assert not coverage.sliced
