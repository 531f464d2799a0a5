from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stratified_embedding_cases import INDEX_LAYOUTS, LAYOUTS, Case, added, oracle, same

from pinet_fast.errors import InputError
from pinet_fast.kernels import stratified_embedding_add, stratified_embedding_reduce
from pinet_fast.kernels.stratified_embedding import reference

SHAPES = st.one_of(
    st.sampled_from([(), (0,), (1,), (15,), (16,), (31,), (33,), (63,), (64,), (65,), (200,)]),
    st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
)
fixture_is_constant = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def cases(draw, dtypes=(torch.float32, torch.float64)):
    case = Case(
        num_strata=draw(st.integers(1, 9)),
        # The last ones are so many that ids are sorted instead of marked.
        num_rows=draw(st.sampled_from([1, 2, 7, 8, 9, 40, 100_000, 2**62])),
        shape=draw(SHAPES),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**32)),
    )
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(0, 30))
        case.add(count, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(INDEX_LAYOUTS)))
    return case


@contextlib.contextmanager
def poisoned():
    """Fill new memory with NaN (integers: their largest value), that of the library too."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def reduce(case, backend):
    return stratified_embedding_reduce(*case.arguments, backend=backend)


@fixture_is_constant
@given(case=cases())
def test_reduce_agrees_with_a_dictionary_bit_by_bit(backend, case):
    with poisoned():
        got = reduce(case, backend)
    for result, expected in zip(got, oracle(case), strict=True):
        assert result.dtype == expected.dtype
        assert result.is_contiguous()
        same(result, expected)


@fixture_is_constant
@given(case=cases(), layout=st.sampled_from(["contiguous", "reversed", "strided", "padded"]))
def test_add_agrees_with_a_dictionary_bit_by_bit(backend, case, layout):
    case.num_rows = min(case.num_rows, 3000)  # sorted as well where there are few entries
    case.ids = [ids % case.num_rows for ids in case.ids]
    dense = case.laid_out((case.num_strata, case.num_rows, *case.shape), layout)
    expected = added(case, dense)
    stratified_embedding_add(dense, *case.lists, backend=backend)
    same(dense, expected)


@fixture_is_constant
@given(case=cases(dtypes=(torch.bfloat16, torch.float16)))
def test_half_precision_falls_back_to_the_reference_and_sums_in_float32(case):
    got = reduce(case, None)
    for result, expected in zip(got, oracle(case), strict=True):
        same(result, expected)
    case.num_rows = min(case.num_rows, 50)
    case.ids = [ids % case.num_rows for ids in case.ids]
    dense = case.normal(case.num_strata, case.num_rows, *case.shape)
    expected = added(case, dense)
    stratified_embedding_add(dense, *case.lists)
    same(dense, expected)


def test_the_example_of_the_formula(backend):
    ids, strata = [torch.tensor([7, 2, 7, 7])], [torch.tensor([0, 1, 0, 1])]
    grads = [torch.tensor([1.0, 2.0, 3.0, 4.0])]
    rows, values, touched = stratified_embedding_reduce(ids, strata, grads, 2, 9, backend=backend)
    assert rows.tolist() == [2, 7]
    assert values.tolist() == [[0, 4], [2, 4]]
    assert touched.tolist() == [[False, True], [True, True]]


def test_touched_does_not_depend_on_the_values(backend):
    """Gradients that are zero, or cancel, touch their row all the same."""
    ids, strata = [torch.tensor([3, 3, 1])], [torch.zeros(3, dtype=torch.int64)]
    grads = [torch.tensor([[1.0], [-1.0], [0.0]])]
    rows, values, touched = stratified_embedding_reduce(ids, strata, grads, 2, 4, backend=backend)
    assert rows.tolist() == [1, 3]
    assert values.count_nonzero() == 0
    assert touched.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("num_rows", [2, 3000])  # fewer and more cells than there are entries
def test_what_no_lookup_touched_keeps_its_bits(backend, num_rows):
    ids, strata = torch.zeros(9, dtype=torch.int64), torch.arange(9) % 2
    dense = torch.full((3, num_rows, 4), -0.0)  # + 0.0 is 0.0
    stratified_embedding_add(dense, [ids], [strata], [torch.ones(9, 4)], backend=backend)
    assert dense[:2, 0].tolist() == [[5.0] * 4, [4.0] * 4]
    untouched = torch.cat([dense[:2, 1:].flatten(), dense[2].flatten()])
    assert untouched.signbit().all()


@settings(deadline=None, max_examples=100)
@given(
    num_cells=st.one_of(st.integers(1, 2**18), st.integers(1, 2**50)),
    count=st.integers(0, 300),
    seed=st.integers(0, 99),
)
def test_cells_are_sorted_stably_digit_by_digit(num_cells, count, seed):
    generator = torch.Generator().manual_seed(seed)
    some = torch.randint(0, num_cells, (20,), generator=generator)  # so that most are repeated
    cells = some[torch.randint(0, 20, (count,), generator=generator)]
    expected = cells.sort(stable=True).indices
    assert torch.equal(reference._stable_order(cells, num_cells), expected)


@pytest.mark.parametrize("num_rows", [0, 5, 10**12])
def test_no_lookup_at_all(backend, num_rows):
    case = Case(3, num_rows, (4,))
    for _ in range(2):
        case.ids.append(torch.empty(0, dtype=torch.int64))
        case.strata.append(torch.empty(0, dtype=torch.int64))
        case.grads.append(torch.empty(0, 4))
    rows, values, touched = reduce(case, backend)
    assert (rows.shape, values.shape, touched.shape) == ((0,), (3, 0, 4), (3, 0))
    dense = torch.full((3, 5, 4), torch.nan)
    stratified_embedding_add(dense, *case.lists, backend=backend)
    assert dense.isnan().all()


def test_no_list_adds_nothing(backend):
    dense = torch.ones(2, 3)
    stratified_embedding_add(dense, [], [], [], backend=backend)
    assert torch.equal(dense, torch.ones(2, 3))


def big_case(hot):
    case = Case(4, 900, (100,), seed=5)
    for count in (5000, 0, 7000):
        case.add(count, ids=[3] * count if hot else None)
    return case


@pytest.mark.parametrize("hot", [False, True], ids=["spread", "one id"])
def test_bits_do_not_depend_on_threads(backend, hot):
    """Large enough for several tasks; with one id they are ranges of its columns."""
    case, dense = big_case(hot), torch.randn(4, 900, 100)
    expected, expected_dense = oracle(case), added(case, dense)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1, 2):
            torch.set_num_threads(count)
            with poisoned():
                got = reduce(case, backend)
            for result, wanted in zip(got, expected, strict=True):
                same(result, wanted)
            target = dense.clone()
            stratified_embedding_add(target, *case.lists, backend=backend)
            same(target, expected_dense)
    finally:
        torch.set_num_threads(threads)


def test_every_row_touched_by_every_stratum(backend):
    case = Case(3, 40, (17,))
    everything = torch.cartesian_prod(torch.arange(3), torch.arange(40))[torch.randperm(120)]
    case.ids, case.strata = [everything[:, 1]], [everything[:, 0]]
    case.grads = [case.normal(120, 17)]
    rows, values, touched = reduce(case, backend)
    assert rows.tolist() == list(range(40))
    assert touched.all()
    assert torch.equal(values[everything[:, 0], everything[:, 1]], case.grads[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_stays_in_its_stratum_item_and_column(backend, bad):
    case = Case(4, 12, (70,), seed=1).add(60, "strided").add(40)
    _, clean, _ = reduce(case, backend)
    case.grads[0][17, 3] = bad
    rows, values, _ = reduce(case, backend)
    u = rows.tolist().index(int(case.ids[0][17]))
    spoilt = torch.zeros_like(values, dtype=torch.bool)
    spoilt[case.strata[0][17], u, 3] = True
    assert not values[spoilt].isfinite().any()
    assert torch.equal(values[~spoilt], clean[~spoilt])


def test_reduce_and_then_add_is_add(backend):
    case = Case(4, 30, (19,), seed=2).add(90).add(10, "padded")
    dense = case.normal(4, 30, 19)
    rows, values, _ = reduce(case, backend)
    expected = dense.index_add(1, rows, values)
    stratified_embedding_add(dense, *case.lists, backend=backend)
    assert torch.equal(dense, expected)


@fixture_is_constant
@given(seed=st.integers(0, 999))
def test_identities(backend, seed):
    """One stratum is the gradient of an embedding, and the strata add up to it."""
    case = Case(5, 30, (6,), torch.float64, seed).add(80).add(30)
    table = torch.zeros(30, 6, dtype=torch.float64, requires_grad=True)
    for ids, grads in zip(case.ids, case.grads, strict=True):
        torch.nn.functional.embedding(ids, table).backward(grads)
    rows, values, touched = reduce(case, backend)
    torch.testing.assert_close(values.sum(0), table.grad[rows])
    assert touched.any(0).all()
    case.strata, case.num_strata = [torch.zeros_like(s) for s in case.strata], 1
    dense = torch.zeros(1, 30, 6, dtype=torch.float64)
    stratified_embedding_add(dense, *case.lists, backend=backend)
    torch.testing.assert_close(dense[0], table.grad)


def test_add_writes_inside_its_target_only(backend):
    case = Case(2, 6, (40,)).add(50)
    guarded = torch.full((4, 10, 48), torch.nan)
    dense = guarded[1:3, 2:8, 3:43]
    dense.zero_()
    stratified_embedding_add(dense, *case.lists, backend=backend)
    assert dense.isfinite().all()
    assert int(guarded.isnan().sum()) == guarded.numel() - dense.numel()
    assert dense.any()


def test_reads_inside_its_gradients_only(backend):
    """Gradients between NaN on all sides, with every remainder of a register."""
    for width in (1, 2, 3, 5, 11, 23, 47, 64, 79):
        case = Case(2, 5, (width,)).add(20)
        expected = oracle(case)
        guarded = torch.full((24, width + 2), torch.nan)
        guarded[2:22, 1:-1] = case.grads[0]
        case.grads = [guarded[2:22, 1:-1]]
        for result, wanted in zip(reduce(case, backend), expected, strict=True):
            same(result, wanted)


def test_untouched_elements_keep_their_bits(backend):
    case = Case(2, 8, (3,)).add(2, ids=[1, 6])
    dense = torch.full((2, 8, 3), -0.0)
    dense[:, 4] = torch.nan
    expected = added(case, dense)
    stratified_embedding_add(dense, *case.lists, backend=backend)
    assert torch.equal(dense.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("num_rows", [5, 10**6], ids=["marked", "sorted"])
@pytest.mark.parametrize("which", ["ids", "strata"])
@pytest.mark.parametrize("outside", [-1, 2**40, -(2**63), "bound"])
def test_out_of_range_is_named_and_nothing_is_written(backend, num_rows, which, outside):
    case = Case(3, num_rows, (4,)).add(6).add(9)
    bound = num_rows if which == "ids" else 3
    value = bound if outside == "bound" else outside
    getattr(case, which)[1][7] = value
    message = rf"{which}\[1\]\[7\]: expected 0..{bound - 1}, got {value}; there are {bound} "
    with pytest.raises(InputError, match=message):
        reduce(case, backend)
    if num_rows == 5:
        dense = torch.full((3, 5, 4), 7.0)
        with pytest.raises(InputError, match=message):
            stratified_embedding_add(dense, *case.lists, backend=backend)
        assert (dense == 7).all()


def test_addresses_beyond_int32(backend):
    distance = 2**31 + 5
    try:
        storage = torch.empty(distance + 7)  # pages that nobody touches cost nothing
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    far = storage.as_strided((2, 7), (distance, 1))
    far.copy_(torch.arange(14.0).view(2, 7))
    zeros = torch.zeros(2, dtype=torch.int64)
    _, values, _ = stratified_embedding_reduce([zeros], [zeros], [far], 1, 2, backend=backend)
    assert torch.equal(values[0, 0], far[0] + far[1])
    dense = storage.as_strided((2, 1, 7), (distance, 7, 1))
    stratified_embedding_add(dense, [zeros], [zeros + 1], [torch.ones(2, 7)], backend=backend)
    assert torch.equal(dense.flatten(), torch.cat([torch.arange(7.0), torch.arange(9.0, 16.0)]))
