"""Division, group norm, convolution, einsum, bmm, bilinear: exact, and torch's own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.boundaries import assert_exact, leaf, per_row
from torch import Tensor

from pinet_fast import GradientAggregator
from pinet_fast.errors import BoundaryError, RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

S = 4
GRADS = ("dense", "expanded", "strided")
examples = settings(max_examples=100, deadline=None)


def batch(data: st.DataObject) -> Tensor:
    """Strata of some users in any order: empty ones, and ones of a single user, among them.

    No other dimension of these tests is as large as the batch.
    """
    users = data.draw(st.sampled_from([4, 6, 7, 8, 9]))
    ids = st.lists(st.integers(0, S - 1), min_size=users, max_size=users)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    return torch.tensor(data.draw(ids))


def laid_out(x: Tensor, data: st.DataObject) -> Tensor:
    """Return a leaf of the same values, contiguous or with another order of its dimensions."""
    if data.draw(st.booleans()) and x.dim() > 1:
        x = x.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
    return x.detach().requires_grad_()


def assert_ruled(coverage: Any, op: str, num_uses: int = 1) -> None:
    assert {(e.op, e.rule) for e in coverage} == {(op, "boundary")}
    assert max(e.use for e in coverage) == num_uses


QUOTIENTS: dict[str, Callable[[Any, Any], Tensor]] = {
    "/": lambda a, b: a / b,
    "torch.div": torch.div,
    "torch.divide": torch.divide,
    "true_divide": lambda a, b: a.true_divide(b),
    "Tensor.div": lambda a, b: a.div(b),
    "other=": lambda a, b: torch.div(a, other=b),
}


@examples
@given(st.data())
def test_division(data: st.DataObject) -> None:
    ids = batch(data)
    users, length, width = len(ids), data.draw(st.sampled_from([1, 11, 13])), 3
    time_major = data.draw(st.booleans())
    lead = (length, users) if time_major else (users, length)
    x = torch.randn(*lead, data.draw(st.sampled_from([width, 1])), dtype=torch.float64)
    x = laid_out(x.abs() + 0.5, data)
    shape = data.draw(
        st.sampled_from([(width,), (1,), (), (1, 1, width), (length, 1, 1)])
        if time_major
        else st.sampled_from([(width,), (1,), (), (1, 1, width), (length, 1), (length, width)])
    )
    p = (leaf(*shape).detach().abs() + 0.5).requires_grad_()
    divide = QUOTIENTS[data.draw(st.sampled_from(list(QUOTIENTS)))]
    grad, turned = data.draw(st.sampled_from(GRADS)), data.draw(st.booleans())

    def losses() -> Tensor:
        out = divide(p, x) if turned else divide(x, p)
        return per_row(out, 1 if time_major else 0, grad)

    assert_ruled(assert_exact(losses, [p], ids, S, below=[x]), "div")


@pytest.mark.parametrize("name", ["/=", "div_", "divide_", "true_divide_"])
def test_division_in_place(name: str) -> None:
    x, p = leaf(5, 3), leaf(3)

    def losses() -> Tensor:
        rows = x + 1
        if name == "/=":
            rows /= p
        else:
            getattr(rows, name)(p)
        return per_row(rows)

    ids = torch.tensor([2, 0, 0, 3, 2])
    assert_ruled(assert_exact(losses, [p], ids, S, below=[x]), "div")


@pytest.mark.parametrize("turned", [False, True])
def test_reversed_division_is_a_product_as_in_torch(turned: bool) -> None:
    x, p = leaf(5, 3), leaf(3)

    def losses() -> Tensor:
        return per_row(x.__rtruediv__(p) if turned else p.__rtruediv__(x))

    coverage = assert_exact(losses, [p], torch.tensor([2, 0, 0, 3, 2]), S, below=[x])
    assert_ruled(coverage, "mul")


def test_division_of_counts_by_a_derived_number() -> None:
    """Rows of integers, and a temperature computed from its logarithm."""
    counts, log = torch.tensor([[3, 1], [0, 2], [5, 7], [1, 1]]), leaf()
    coverage = assert_exact(
        lambda: per_row(counts / log.exp()), [log], torch.tensor([1, 0, 1, 3]), S
    )
    assert_ruled(coverage, "div")


@examples
@given(st.data())
def test_group_norm(data: st.DataObject) -> None:
    ids = batch(data)
    num_groups, per_group = data.draw(st.sampled_from([(1, 3), (3, 2), (2, 5), (5, 1)]))
    channels = num_groups * per_group
    spatial = data.draw(st.sampled_from([(), (11,), (3, 2), (2, 3, 2)]))
    if not spatial:
        num_groups = 1  # several values a group: of one, or of two, nothing or a sign is left
    x = laid_out(torch.randn(len(ids), channels, *spatial, dtype=torch.float64), data)
    if len(spatial) == 2 and data.draw(st.booleans()):
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = leaf(channels), leaf(channels)
    kind = data.draw(st.sampled_from(["both", "no bias", "foreign scale", "foreign bias"]))
    grad = data.draw(st.sampled_from(GRADS))
    parameters = {"both": [weight, bias], "foreign scale": [bias]}.get(kind, [weight])
    below = {"foreign scale": [x, weight], "foreign bias": [x, bias]}.get(kind, [x])
    function = data.draw(st.sampled_from([F.group_norm, torch.group_norm]))

    def losses() -> Tensor:
        b = None if kind == "no bias" else bias
        return per_row(function(x, num_groups, weight, b, eps=1e-3), grad=grad)

    assert_ruled(assert_exact(losses, parameters, ids, S, below=below), "group_norm")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@examples
@given(st.data())
def test_conv1d(data: st.DataObject) -> None:
    ids = batch(data)
    groups, kernel = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 4))
    options = {
        "stride": data.draw(st.sampled_from([1, 2, (3,)])),
        "padding": data.draw(st.sampled_from([0, 2, (1,), "same", "valid"])),
        "dilation": data.draw(st.sampled_from([1, 2, [3]])),
        "groups": groups,
    }
    if options["padding"] == "same":
        options["stride"] = 1
    x = laid_out(torch.randn(len(ids), 4, 13, dtype=torch.float64), data)
    weight, bias = leaf(8, 4 // groups, kernel), leaf(8)
    kind = data.draw(st.sampled_from(["both", "no bias", "foreign bias", "foreign weight"]))
    parameters = {"both": [weight, bias], "foreign weight": [bias]}.get(kind, [weight])
    below = {"foreign bias": [x, bias], "foreign weight": [x, weight]}.get(kind, [x])
    grad = data.draw(st.sampled_from(GRADS))

    def losses() -> Tensor:
        b = None if kind == "no bias" else bias
        return per_row(torch.conv1d(x, weight, b, **options), grad=grad)

    assert_ruled(assert_exact(losses, parameters, ids, S, below=below), "conv1d")


@examples
@given(st.data())
def test_bilinear(data: st.DataObject) -> None:
    ids = batch(data)
    lead = data.draw(st.sampled_from([(len(ids),), (len(ids), 11), (11, len(ids))]))
    left = laid_out(torch.randn(*lead, 3, dtype=torch.float64), data)
    right = laid_out(torch.randn(*lead, 5, dtype=torch.float64), data)
    weight, bias = leaf(2, 3, 5), leaf(2)
    kind = data.draw(st.sampled_from(["both", "no bias", "foreign bias", "foreign weight"]))
    parameters = {"both": [weight, bias], "foreign weight": [bias]}.get(kind, [weight])
    below = {"foreign bias": [bias], "foreign weight": [weight]}.get(kind, [])
    grad = data.draw(st.sampled_from(GRADS))

    def losses() -> Tensor:
        out = F.bilinear(left, right, weight, None if kind == "no bias" else bias)
        return per_row(out, lead.index(len(ids)), grad)

    found = assert_exact(losses, parameters, ids, S, below=[left, right, *below])
    assert_ruled(found, "bilinear")


SIZES = {"l": 11, "d": 3, "e": 5, "h": 2}
EINSUMS = {  # equation: whether it has batched letters
    "bd,de->be": False,
    "bd,ed->be": False,
    "bld,de->ble": False,
    "bld,de->bel": False,
    "lbd,de->lbe": False,
    "dlb,ed->elb": False,
    "bld,hde->bhle": False,
    "bhd,hde->be": False,
    "bld,d->bl": False,
    "bd,e->bde": False,
    "bd,d->bd": True,
    "bhd,hde->bhe": True,
    "hbd,hde->hbe": True,
    "bldh,hed->hble": True,
}


@examples
@given(st.data())
def test_einsum(data: st.DataObject) -> None:
    ids = batch(data)
    equation = data.draw(st.sampled_from(list(EINSUMS)))
    is_batched = EINSUMS[equation]
    inputs, out = equation.split("->")
    rows, weight = inputs.split(",")
    sizes = {**SIZES, "b": len(ids)}
    x = laid_out(torch.randn([sizes[c] for c in rows], dtype=torch.float64), data)
    w = leaf(*(sizes[c] for c in weight))
    grad, turned = data.draw(st.sampled_from(GRADS)), data.draw(st.booleans())
    spaced = f" {weight}, {rows} -> {out}" if turned else equation
    operands = (w, x) if turned else (x, w)
    as_list = data.draw(st.booleans())

    def losses() -> Tensor:
        found = torch.einsum(spaced, operands) if as_list else torch.einsum(spaced, *operands)
        return per_row(found, out.index("b"), grad if found.dim() > 1 else "dense")

    coverage = assert_exact(losses, [w], ids, S, below=[x])
    assert_ruled(coverage, "einsum (batched)" if is_batched else "einsum")


@pytest.mark.parametrize("equation", ["...d,de->...e", "d...,de->e...", "...d,...->...d"])
def test_einsum_with_an_ellipsis(equation: str) -> None:
    if equation.startswith("d"):
        x, w = leaf(3, 7, 11), leaf(3, 5)
    elif equation.endswith("e"):
        x, w = leaf(7, 11, 3), leaf(3, 5)
    else:
        x, w = leaf(7, 11, 3), leaf(11)  # in both operands: not spelled out
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    dim = 1 if equation.startswith("d") else 0
    coverage = assert_exact(
        lambda: per_row(torch.einsum(equation, x, w), dim), [w], ids, S, below=[x]
    )
    assert bool(coverage.sliced) == equation.endswith("...d")


def test_einsum_by_numbers() -> None:
    """Torch spells it by letters before anybody sees it."""
    x, w = leaf(7, 11, 3), leaf(3, 5)
    coverage = assert_exact(
        lambda: per_row(torch.einsum(x, [0, 1, 2], w, [2, 3], [0, 1, 3])), [w],
        torch.tensor([2, 0, 1, 1, 0, 2, 2]), S, below=[x],
    )  # fmt: skip
    assert_ruled(coverage, "einsum")


@examples
@given(st.data())
def test_bmm(data: st.DataObject) -> None:
    ids = batch(data)
    turned, grad = data.draw(st.booleans()), data.draw(st.sampled_from(GRADS))
    shape = (2, 3, len(ids)) if turned else (2, len(ids), 3)
    x, w = laid_out(torch.randn(shape, dtype=torch.float64), data), leaf(2, 3, 5)
    call = data.draw(st.sampled_from([torch.bmm, Tensor.bmm]))

    def losses() -> Tensor:
        out = call(w.transpose(1, 2), x) if turned else call(x, w)
        return per_row(out, 2 if turned else 1, grad)

    assert_ruled(assert_exact(losses, [w], ids, S, below=[x]), "bmm")


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


@pytest.mark.parametrize("name", ["group_norm", "stride with same", "mixed rows", "undecided"])
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
    else:
        with pytest.raises(RowLayoutError, match="undecided"), opt.stratify(ids):
            torch.einsum("bld,de->ble", leaf(7, 7, 3), kernel[0])


def test_sizes_that_only_look_like_rows_do_not_disturb() -> None:
    """Channels, positions or features as many as users: a convolution knows where rows are."""
    ids = torch.tensor([2, 0, 1])
    x, w, scale = leaf(3, 3, 3), leaf(3, 3, 1), leaf(3)

    def losses() -> Tensor:
        return per_row(F.group_norm(torch.conv1d(x, w), 1, scale))

    coverage = assert_exact(losses, [w, scale], ids, S, below=[x])
    assert not coverage.sliced


# What every boundary must bear.


def twice(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *ps: call(x, *ps) + call(0.5 * x, *ps)


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], list[tuple[int, ...]]]] = {
    # op: (call, sizes of the rows behind the users, sizes of the parameters)
    "div": (lambda x, p: x / (p * p + 1), (5,), [(5,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (4, 5), [(4,), (4,)]),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), (4, 5), [(3, 4, 3), (3,)]),
    "bilinear": (F.bilinear, (5,), []),
    "einsum": (lambda x, w: torch.einsum("bd,de->be", x, w), (5,), [(5, 3)]),
    "einsum (batched)": (lambda x, w: torch.einsum("bhd,hde->bhe", x, w), (2, 5), [(2, 5, 3)]),
    "bmm": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (2, 5), [(2, 5, 3)]),
}
CALLS["bilinear"] = (lambda x, w, b: F.bilinear(x, x.cos(), w, b), (5,), [(3, 5, 5), (3,)])


@pytest.mark.parametrize("op", CALLS)
def test_a_weight_used_twice(op: str) -> None:
    call, sizes, shapes = CALLS[op]
    ids = torch.tensor([3, 0, 0, 3, 3, 1, 3])
    x, ps = leaf(7, *sizes), [leaf(*shape) for shape in shapes]
    coverage = assert_exact(lambda: per_row(twice(call)(x, *ps)), ps, ids, S, below=[x])
    assert_ruled(coverage, op, 2)


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
