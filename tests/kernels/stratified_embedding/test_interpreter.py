"""The Triton backend in Triton's interpreter, in a process of its own.

Run as a script, this file is that process: it prints a line per check.
"""

from __future__ import annotations

import pytest
import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def passed(interpreted):
    """Return the names of the checks that passed in the process with the interpreter."""
    return interpreted(__file__)


def make(count, num_rows, strata, shape=(5,), dtype=torch.float32, seed=0):
    """Return a case of three lists of different layouts."""
    from stratified_embedding_cases import INDEX_LAYOUTS, LAYOUTS, Case

    case = Case(strata, num_rows, shape, dtype, seed)
    for k, size in enumerate((count, count // 2, min(count, 7))):
        case.add(size, LAYOUTS[(seed + k) % 6], INDEX_LAYOUTS[(seed + k) % 4])
    return case


def reduced(case):
    from pinet_fast.kernels import stratified_embedding_reduce

    return stratified_embedding_reduce(*case.arguments, backend="triton")


def assert_near(got, expected, case, terms):
    """Check sums of so many numbers of order one, that may be summed in any order."""
    wide = torch.promote_types(case.dtype, torch.float32)
    allowed = 8 * terms * torch.finfo(wide).eps
    if case.dtype is not wide:
        allowed += 2 * torch.finfo(case.dtype).eps * expected.double().abs()
    assert ((got.double() - expected.double()).abs() <= allowed).all()


def same_but_for_the_interpreter(got, expected, case):
    """Check bits; the interpreter drops the digits that bfloat16 lacks, where GPUs round."""
    from stratified_embedding_cases import same

    if case.dtype is torch.bfloat16:
        assert_near(got, expected, case, 2)
    else:
        same(got, expected)


def check_short_cells_agree_with_the_oracle_in_every_bit():
    from stratified_embedding_cases import added, oracle, same

    from pinet_fast.kernels import _registry, stratified_embedding_add

    shapes = ((5,), (), (64,), (0,), (3, 4), (130,))
    for i, shape in enumerate(shapes):
        for k, (count, num_rows, strata) in enumerate(((30, 11, 3), (1, 1, 1), (0, 3, 2))):
            case = make(count, num_rows, strata, shape, DTYPES[(i + k) % 4], seed=i)
            (rows, values, touched), right = reduced(case), oracle(case)
            same((rows, touched), (right[0], right[2]))
            same_but_for_the_interpreter(values, right[1], case)
            dense = case.normal(strata, num_rows, *shape)
            if i % 2:  # any strides
                dense = case.normal(*reversed(shape), num_rows, strata).permute(
                    -1, -2, *reversed(range(len(shape)))
                )
            right = added(case, dense)
            stratified_embedding_add(dense, *case.lists, backend="triton")
            same_but_for_the_interpreter(dense, right, case)
    assert _registry.num_calls("stratified_embedding_reduce", "triton") == 18
    assert _registry.num_calls("stratified_embedding_add", "triton") == 18


def check_long_cells_agree_with_the_oracle():
    from stratified_embedding_cases import added, oracle, same

    from pinet_fast.kernels.stratified_embedding import _triton

    for i, (count, num_rows, strata) in enumerate(((500, 1, 1), (900, 3, 2), (700, 40, 1))):
        for dtype in (DTYPES[i], torch.float32):
            case = make(count, num_rows, strata, (6,), dtype, seed=i)
            case.ids[0][100:400] = 0  # one item as popular as that, beside others
            rows, values, touched = reduced(case)
            right = oracle(case)
            same((rows, touched), (right[0], right[2]))
            assert_near(values, right[1], case, count)
            dense = case.normal(strata, num_rows, 6)
            expected = added(case, dense)
            _triton.run_add(dense, *case.lists)
            assert_near(dense, expected, case, count)


def check_cells_of_all_lengths_around_the_limit():
    from stratified_embedding_cases import Case, oracle, same

    long = 64
    sizes = [1, long - 1, long, long + 1, 2 * long - 1, 2 * long, 2 * long + 1, 3 * long, 2, 1, 200]
    for start in (0, 1, 30, long - 1):  # where in its block the first cell begins
        ids = [0] * start + [v + 1 for v, size in enumerate(sizes) for _ in range(size)]
        case = Case(1, len(sizes) + 1, (3,)).add(len(ids), ids=ids)
        case.grads[0] = case.grads[0].sign()  # so that sums are exact
        same(reduced(case), oracle(case))


def check_any_order_of_programs_gives_the_same_bits():
    from stratified_embedding_cases import same

    from pinet_fast.kernels.stratified_embedding import _triton

    case = make(1200, 7, 3, (70,))
    dense = case.normal(3, 7, 70)
    results = []
    for reverse in (False, True, False):
        out = dense.clone()
        _triton.run_add(out, *case.lists, reverse=reverse)
        results.append((*_triton.run_reduce(*case.arguments, reverse=reverse), out))
    for result in results[1:]:
        same(result, results[0])


def check_fills_its_outputs_and_its_scratch_and_reads_nothing_else():
    from interpreter_checks import poisoned_scratch, surrounded
    from stratified_embedding_cases import Case, oracle, same

    for count, width in ((30, 5), (300, 3), (1, 1)):
        case = Case(2, 4, (width,)).add(count).add(count)
        case.grads = [surrounded(grad.sign()) for grad in case.grads]  # sums are exact
        with poisoned_scratch() as scratch:
            got = reduced(case)
        assert scratch
        same(got, oracle(case))


def check_adding_leaves_all_else_alone():
    from stratified_embedding_cases import Case, added, same

    from pinet_fast.kernels import stratified_embedding_add

    case = Case(2, 9, (3,)).add(4, ids=[1, 8, 1, 3])
    whole = torch.full((2, 11, 5), torch.nan)
    dense = whole[:, 1:-1, 1:-1]
    dense[:] = -0.0
    dense[:, 5] = torch.nan
    right = added(case, dense)
    stratified_embedding_add(dense, *case.lists, backend="triton")
    same(dense, right)
    assert torch.equal(dense.signbit(), right.signbit())
    whole[:, 1:-1, 1:-1] = torch.nan
    assert whole.isnan().all()


def check_a_bad_number_stays_in_its_cell():
    from stratified_embedding_cases import Case

    for count in (40, 600):
        case = Case(3, 4, (5,)).add(count)
        case.grads[0][17, 2] = torch.nan
        rows, values, _ = reduced(case)
        place = rows.tolist().index(case.ids[0][17])
        assert values.isnan().nonzero().tolist() == [[case.strata[0][17].item(), place, 2]]


def check_entries_out_of_range():
    from stratified_embedding_cases import Case, added, same

    from pinet_fast.errors import InputError
    from pinet_fast.kernels import stratified_embedding_add

    for bad in ((0, 9), (1, -1)):
        case = Case(2, 4, (3,)).add(200)
        case.grads[0] = case.grads[0].sign()
        name = ("ids", "strata")[bad[0]]
        spoilt = torch.arange(200) % 2 == 0
        (case.ids, case.strata)[bad[0]][0][spoilt] = bad[1]
        with pytest.raises(InputError, match=rf"{name}\[0\]\[0\]: expected 0\.\."):
            reduced(case)
        dense = torch.zeros(2, 4, 3)
        kept = Case(2, 4, (3,))
        kept.ids, kept.strata, kept.grads = ([x[0][~spoilt]] for x in case.lists)
        right = added(kept, dense)
        stratified_embedding_add(dense, *case.lists, backend="triton")
        same(dense, right)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.interpret
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_the_interpreter(passed, check):
    assert check in passed


if __name__ == "__main__":
    from interpreter_checks import run_checks

    run_checks(CHECKS)
