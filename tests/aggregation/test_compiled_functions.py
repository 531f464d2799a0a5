"""What the compiled module does for all parameters at once, against the ops and Python's way."""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pinet_fast.aggregation import StrataIndex, compiled, pending
from pinet_fast.aggregation.collection import Collected
from pinet_fast.aggregation.leaves import Root
from pinet_fast.aggregation.losses import stratum_losses
from pinet_fast.aggregation.pending import PendingGradients, gradients_apart, hold_nothing
from pinet_fast.aggregation.rows import BatchRows
from pinet_fast.aggregation.stratum_gradient import StratumGradient, from_lookups
from pinet_fast.errors import InputError
from pinet_fast.kernels import (
    _registry,
    stratified_embedding_reduce,
    stratum_combine,
    stratum_gram,
    stratum_solve,
)
from pinet_fast.kernels.stratum_solve import RULES

if TYPE_CHECKING:
    from collections.abc import Callable

MODULE, REASON = compiled.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"not compiled here: {REASON}")


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    """Callers ask the registry first, which loads the kernels that the module calls."""
    assert _registry.is_first("cpp", _registry.ops())


SHAPES = st.lists(st.sampled_from([(), (1,), (7,), (3, 5), (0, 4), (65,)]), min_size=1, max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def strided(x: Tensor, how: int) -> Tensor:
    """Return the same values as they are, with gaps, or with the first dimension last in memory."""
    if how == 1:
        return torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0]
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if how == 2 else x


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


# Gram ---------------------------------------------------------------------------------------------


@given(SHAPES, st.integers(1, 5), DTYPES, st.integers(0, 2), st.booleans())
def test_gram_is_that_of_the_op(
    shapes: list[tuple[int, ...]], strata: int, dtype: torch.dtype, how: int, has_nan: bool
) -> None:
    grads = [
        strided(numbers(strata, *shape, seed=i, dtype=dtype), how) for i, shape in enumerate(shapes)
    ]
    if has_nan and grads[0].numel():
        grads[0][0].fill_(torch.nan)
    grams, whole = MODULE.gram(grads)
    expected = stratum_gram(grads, backend="cpp")
    assert torch.equal(grams.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(whole.nan_to_num(7.0), expected.sum(0).nan_to_num(7.0))
    assert not grams.requires_grad


def test_gram_leaves_to_python_what_is_not_for_the_kernel() -> None:
    good = torch.ones(2, 3)
    for other in (
        good.bfloat16(), good.to_sparse(), good.int(), torch.tensor(1.0), torch.ones(3, 3),
        torch.ones(0, 3), good.as_subclass(Subclass), good.to("meta"),
    ):  # fmt: skip
        assert MODULE.gram([good, other]) is None
    assert MODULE.gram([]) is None
    with Seen():
        assert MODULE.gram([good]) is None
    with pytest.raises(TypeError, match="list"):
        MODULE.gram((good,))


# Weights ------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 3), st.data())
def test_weights_are_those_of_the_op(strata: int, grams: int, data: st.DataObject) -> None:
    rows = numbers(*([grams] if grams else []), strata, 8, seed=strata, dtype=torch.float64)
    gram = rows @ rows.mT
    present = data.draw(st.lists(st.booleans(), min_size=strata, max_size=strata))
    rule = data.draw(st.sampled_from(["agreement", "balanced", "mgda", "imtlg", "alignedmtl"]))
    found = MODULE.solve(gram, RULES.index(rule), present)
    if not any(present):
        assert found is None
        return
    assert torch.equal(found, stratum_solve(gram, rule, present=present, backend="cpp"))


def test_weights_leave_to_python_what_is_not_for_the_kernel() -> None:
    gram = torch.eye(2, dtype=torch.float64)
    assert MODULE.solve(gram, 0, [True, True]) is not None
    for other in (gram.float(), gram[0], gram[:1], gram.as_subclass(Subclass), gram.to("meta")):
        assert MODULE.solve(other, 0, [True, True]) is None
    for present in ([True], (True, True), None):
        assert MODULE.solve(gram, 0, present) is None
    assert MODULE.solve(torch.eye(65, dtype=torch.float64), 0, [True] * 65) is None


# Combination --------------------------------------------------------------------------------------


def parameters_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(numbers(*shape, seed=9, dtype=dtype)) for shape in shapes]


@given(SHAPES, st.integers(1, 5), DTYPES, st.integers(0, 2), st.data())
def test_what_is_written_is_what_the_op_gives(
    shapes: list[tuple[int, ...]], strata: int, dtype: torch.dtype, how: int, data: st.DataObject
) -> None:
    parameters = parameters_of(shapes, dtype)
    grads, rows = [], []
    for i, shape in enumerate(shapes):
        touched = None
        if shape and shape[0] and data.draw(st.booleans()):
            kept = data.draw(st.sets(st.integers(0, shape[0] - 1)))
            touched = torch.tensor(sorted(kept), dtype=torch.int64)
            shape = (len(kept), *shape[1:])
        grads.append(strided(numbers(strata, *shape, seed=i, dtype=dtype), how))
        rows.append(touched)
    count = [len(shapes)] if data.draw(st.booleans()) else []
    weights = numbers(*count, strata, seed=1, dtype=torch.float64)
    if data.draw(st.booleans()):
        weights[..., 0] = 0.0
        for grad in grads:
            grad[0].fill_(torch.nan)  # must not show
    outs = [torch.full_like(p, torch.nan) for p in parameters]
    stratum_combine(grads, weights, outs, rows=rows, backend="cpp")
    written = MODULE.write(parameters, grads, rows, weights)
    for p, out, expected in zip(parameters, written, outs, strict=True):
        assert p.grad is out
        assert torch.equal(out, expected.detach())
        assert out._version == 0
        assert not out.requires_grad


def refusals() -> list[tuple[str, Callable[[nn.Parameter], Any]]]:
    def hooked(p: nn.Parameter) -> None:
        p.register_hook(lambda g: g)

    def hooked_after(p: nn.Parameter) -> None:
        p.register_post_accumulate_grad_hook(lambda p: None)

    def with_gradient(p: nn.Parameter) -> None:
        p.grad = torch.ones_like(p)

    return [("hook", hooked), ("hook after", hooked_after), ("gradient", with_gradient)]


@pytest.mark.parametrize(("name", "change"), refusals())
def test_nothing_is_written_where_a_parameter_holds_something(
    name: str, change: Callable[[nn.Parameter], Any]
) -> None:
    parameters = parameters_of([(3,), (2, 2)], torch.float32)
    assert MODULE.holds_nothing(parameters)
    change(parameters[1])
    assert not MODULE.holds_nothing(parameters), name
    before = parameters[1].grad
    grads = [torch.ones(2, 3), torch.ones(2, 2, 2)]
    weights = torch.ones(2, dtype=torch.float64)
    assert MODULE.write(parameters, grads, [None, None], weights) is None
    assert parameters[0].grad is None
    assert parameters[1].grad is before


def test_nothing_is_written_where_sizes_or_dtypes_do_not_fit() -> None:
    (p,) = parameters_of([(3, 2)], torch.float32)
    weights = torch.ones(2, dtype=torch.float64)
    rows = torch.tensor([0, 2])
    good = torch.ones(2, 3, 2)
    for grad, row, weight in (
        (good.double(), None, weights), (good[:, :2], None, weights), (good, rows, weights),
        (good[:, :2], rows.int(), weights), (good[:, :2], rows.view(1, 2), weights),
        (good, None, weights.float()), (good, None, torch.ones(3, dtype=torch.float64)),
        (good, None, torch.ones(2, 2, dtype=torch.float64)), (good[0], None, weights),
        (good, None, torch.ones(1, 1, 2, dtype=torch.float64)),
    ):  # fmt: skip
        assert MODULE.write([p], [grad], [row], weight) is None
        assert p.grad is None
    with pytest.raises(ValueError, match="one length"):
        MODULE.write([p], [good], [], weights)
    with pytest.raises(RuntimeError, match="ascending, distinct rows"):  # as the op says it
        MODULE.write([p], [good[:, :2]], [torch.tensor([2, 0])], weights)
    assert p.grad is None
    assert MODULE.write([p], [good[:, :2]], [rows], weights) is not None


def test_a_second_backward_counts_the_first_one_in() -> None:
    """What was written in one call is taken apart where another backward adds to it."""
    ours, theirs = (parameters_of([(3,), (2, 2)], torch.float32) for _ in range(2))
    weights = torch.tensor([0.25, 0.5], dtype=torch.float64)

    def run(parameters: list[nn.Parameter], at_once: bool, between: Any = None) -> None:
        kept = PendingGradients()
        for seed in range(2):
            strata = [StratumGradient(numbers(2, *p.shape, seed=seed)) for p in parameters]
            present = kept.add(parameters, Collected(list(strata)), [True, False])
            assert present == [True, False]
            if not (at_once and kept.write_weighted(weights)):
                combined = [
                    torch.einsum("s,s...->...", weights.float(), g.values)
                    for _, g in kept.touched()
                ]
                kept.write(combined)
            if between is not None:
                between(parameters)

    for between in (None, lambda ps: ps[0].grad.mul_(2.0)):
        for p in (*ours, *theirs):
            p.grad = None
        run(ours, True, between)
        run(theirs, False, between)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad)


# Lookups ------------------------------------------------------------------------------------------


def lookup(count: int, strata: int, items: int, seed: int, width: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack(
        [
            torch.randint(strata, (count,), generator=generator),
            torch.randint(items, (count,), generator=generator),
        ]
    )
    values = numbers(count, width, seed=seed)
    return torch.sparse_coo_tensor(places, values, (strata, items, width), check_invariants=True)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 4))
def test_lookups_are_reduced_as_the_op_does(counts: list[int], strata: int) -> None:
    lookups = [lookup(n, strata, 6, seed=i) for i, n in enumerate(counts)]
    found = MODULE.reduce(lookups)
    expected = stratified_embedding_reduce(
        [g._indices()[1] for g in lookups],
        [g._indices()[0] for g in lookups],
        [g._values() for g in lookups],
        strata,
        6,
        backend="cpp",
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_lookups_leave_to_python_what_is_not_for_the_kernel() -> None:
    good = lookup(4, 2, 6, seed=0)
    for other in (
        good.to_dense(), lookup(4, 3, 6, seed=0), lookup(4, 2, 5, seed=0), good.double(),
        lookup(4, 2, 6, seed=0, width=2), good.bfloat16(),
    ):  # fmt: skip
        assert MODULE.reduce([good, other]) is None
    assert MODULE.reduce([]) is None


def test_an_item_out_of_range_is_named() -> None:
    places = torch.tensor([[0, 1], [2, 6]])
    bad = torch.sparse_coo_tensor(places, torch.ones(2, 3), (2, 6, 3), check_invariants=False)
    assert MODULE.reduce([bad]) is None
    with pytest.raises(InputError, match=r"ids\[0\]\[1\]: expected 0\.\.5, got 6"):
        from_lookups([bad], None, is_sparse=False)


# Losses -------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    DTYPES,
    st.none() | st.tuples(*[st.floats(-2, 2, width=32)] * 4),
)
def test_losses_are_reduced_alike(
    ids: list[int], dtype: torch.dtype, cotangents: tuple[float, ...] | None
) -> None:
    """Means, and the gradient of every row, have the same bits with the module and without."""
    rows = BatchRows(StrataIndex(torch.tensor(ids), 4))
    found = []
    for lane in ("1", "0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PINET_FAST_LANE", lane)
            losses = numbers(len(ids), seed=3, dtype=dtype).requires_grad_()
            reduced = stratum_losses(losses, None, rows)
            means = reduced.reduce(cotangents)
            reduced.backward()
            found.append((means, losses.grad))
            values = reduced.values
            torch.testing.assert_close(means, values.detach())
            given_ones = torch.ones(4, dtype=dtype) if cotangents is None else None
            factors = given_ones if cotangents is None else torch.tensor(cotangents, dtype=dtype)
            (by_graph,) = torch.autograd.grad(values, losses, factors)
            assert torch.equal(by_graph, losses.grad)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_losses_leave_to_python_what_is_not_for_the_module() -> None:
    losses, ids = torch.ones(3), torch.tensor([0, 1, 1])
    assert MODULE.mean_losses(losses, ids, (1, 2), None) is not None
    for other in (losses.bfloat16(), losses[:2], torch.ones(6)[::2], losses.view(3, 1)):
        assert MODULE.mean_losses(other, ids, (1, 2), None) is None
    assert MODULE.mean_losses(losses, ids.int(), (1, 2), None) is None
    with pytest.raises(IndexError, match="out of range"):
        MODULE.mean_losses(losses, torch.tensor([0, 1, 2]), (1, 2), None)
    for cotangents in ((1.0,), [1.0, 1.0]):
        with pytest.raises(ValueError, match="one number a stratum"):
            MODULE.mean_losses(losses, ids, (1, 2), cotangents)
    with pytest.raises(TypeError):
        MODULE.mean_losses(losses, ids, (1, 2), ("a", "b"))


# Leaves -------------------------------------------------------------------------------------------


def leaves_of(*gradients: Tensor | None) -> dict[int, tuple[Root, Tensor]]:
    found = {}
    for i, gradient in enumerate(gradients):
        tensor = nn.Parameter(torch.ones(2))
        leaf = tensor.detach().expand(3, 2).requires_grad_()
        leaf.grad = gradient
        found[i] = (Root(tensor, (i,), is_parameter=True), leaf)
    return found


def test_gradients_are_taken_from_their_leaves() -> None:
    leaves = leaves_of(torch.ones(3, 2), None, torch.zeros(3, 2))
    given_to = [leaf.grad for _, leaf in leaves.values()]
    taken = MODULE.take_gradients(leaves, 4)
    assert taken[0] is given_to[0]
    assert taken[2] is given_to[2]
    assert taken[1] is None
    assert taken[3] is None
    assert all(leaf.grad is None for _, leaf in leaves.values())


def test_unusual_gradients_stay_where_they_are() -> None:
    full = torch.ones(3, 2)
    derived, double, out_of_range = leaves_of(full, full), leaves_of(full, full), leaves_of(full)
    derived[1][0].is_parameter = False
    double[1][0].sources = (0,)
    for leaves, count in (
        (derived, 2), (double, 2), (out_of_range, 0), (leaves_of(full, full.to_sparse()), 2),
    ):  # fmt: skip
        assert MODULE.take_gradients(leaves, count) is None
        assert all(leaf.grad is not None for _, leaf in leaves.values())
    with pytest.raises(TypeError, match=r"\(root, leaf\)"):
        MODULE.take_gradients({0: "leaf"}, 1)


def test_gradients_apart_puts_back_whatever_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for lane in ("1", "0"):
        monkeypatch.setenv("PINET_FAST_LANE", lane)
        parameters = parameters_of([(2,), (3,)], torch.float32)
        assert hold_nothing(parameters) == (lane == "1")
        with gradients_apart(parameters):
            parameters[0].grad = torch.ones(2)
        assert parameters[0].grad is None
        kept = parameters[1].grad = torch.ones(3)
        with gradients_apart(parameters):
            assert parameters[1].grad is None
        assert parameters[1].grad is kept
        with suppress(KeyError), gradients_apart(parameters):
            parameters[1].grad = torch.zeros(3)
            raise KeyError
        assert parameters[1].grad is kept
        calls: list[Tensor] = []
        parameters[0].register_hook(calls.append)
        with gradients_apart(parameters):
            (parameters[0] * 2).sum().backward()
        assert not calls
        (parameters[0] * 2).sum().backward()
        assert len(calls) == 1


def test_nothing_is_held_after_the_calls() -> None:
    """References balance: what a call was given and what it returned can go."""
    weights = torch.ones(2, dtype=torch.float64)

    def once() -> list[weakref.ref[Any]]:
        (p,) = parameters_of([(3,)], torch.float32)
        grad = torch.ones(2, 3)
        leaves = leaves_of(torch.ones(3, 2))
        held: list[Any] = [p, grad, leaves[0][1]]
        held += MODULE.write([p], [grad], [None], weights)
        held += MODULE.gram([grad])
        held += MODULE.reduce([lookup(4, 2, 6, seed=0)])
        held += MODULE.take_gradients(leaves, 1)
        held += MODULE.mean_losses(torch.ones(2), torch.tensor([0, 1]), (1, 1), None)
        held.append(MODULE.solve(torch.eye(2, dtype=torch.float64), 0, [True, True]))
        return [weakref.ref(x) for x in held]

    references = once()
    gc.collect()
    assert len(references) == 3 + 1 + 2 + 3 + 1 + 2 + 1
    assert all(reference() is None for reference in references)
    none = sys.getrefcount(None)
    for _ in range(100):
        MODULE.gram([])
        MODULE.take_gradients(leaves_of(None), 1)
        MODULE.write([], [], [], weights)
    assert abs(sys.getrefcount(None) - none) < 50


# Which way is taken -------------------------------------------------------------------------------


def test_another_backend_is_asked_where_one_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = ("stratum_gram", "stratum_combine")
    assert _registry.is_first("cpp", ops)
    monkeypatch.setenv("PINET_FAST_BACKEND", "reference")
    assert not _registry.is_first("cpp", ops)
    assert _registry.is_first("reference", ()) is True
    (p,) = parameters_of([(3,)], torch.float32)
    kept = pending.PendingGradients()
    kept.add([p], Collected([StratumGradient(torch.ones(2, 3))]), [True, True])
    assert not kept.write_weighted(torch.ones(2, dtype=torch.float64))
    assert p.grad is None


def test_the_module_is_off_where_the_lane_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.functions() is MODULE
    monkeypatch.setenv("PINET_FAST_LANE", "0")
    assert compiled.functions() is None
