"""Division, group norm, convolution, einsum, bmm, bilinear: exact, and torch's own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.boundaries import assert_exact, assert_ruled, leaf, per_row
from torch import Tensor

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


@pytest.mark.parametrize("op", ["div", "mul", "add"])
def test_rows_that_broadcasting_widens_keep_what_their_graph_tells(op: str) -> None:
    """As many positions as users, [B, L, 1] and a parameter [D]: known from the boundary below."""
    x, first, p = leaf(7, 5), leaf(5, 7), leaf(3)

    def losses() -> Tensor:
        return per_row(getattr(torch, op)((x @ first).unsqueeze(2), p))

    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    assert not assert_exact(losses, [first, p], ids, S, below=[x]).sliced


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
    "bd,->bd": False,
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
