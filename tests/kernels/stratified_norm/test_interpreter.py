"""The Triton backend in Triton's interpreter, in a process of its own.

Run as a script, this file is that process: it prints a line per check.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def passed(interpreted):
    """Return the names of the checks that passed in the process with the interpreter."""
    return interpreted(__file__)


def outputs(case, *needs):
    rows, strata = case.rows, case.num_strata
    half = rows.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half else rows.dtype
    shapes = ((rows.shape, rows.dtype), *[((strata, rows.shape[1]), dtype)] * 2)
    return [
        torch.full(shape, torch.nan, dtype=dtype) if need else None
        for (shape, dtype), need in zip(shapes, needs, strict=True)
    ]


def check_agrees_with_the_oracle():
    from stratified_norm_cases import LAYOUTS, assert_close, make_case

    from pinet_fast.kernels import _registry, stratified_norm_backward

    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    sizes = [(0, 4, 2), (1, 1, 1), (70, 5, 3), (90, 64, 8), (40, 33, 9), (12, 700, 9), (5, 0, 2)]
    for i, (count, width, strata) in enumerate(sizes):
        for k, layout in enumerate(LAYOUTS):
            case = make_case(
                count, width, strata, dtype=dtypes[(i + k) % 4], seed=k,
                order="sorted" if k % 2 else "any", layouts=(layout, LAYOUTS[(k + i) % 5]),
                has_weight=k != 2,
            )  # fmt: skip
            got = stratified_norm_backward(*case.arguments(), backend="triton")
            assert_close(got, case)
    calls = _registry.num_calls("stratified_norm_backward", "triton")
    assert calls == len(sizes) * len(LAYOUTS)


def check_wide_rows_and_many_strata_take_two_kernels():
    from stratified_norm_cases import assert_close, make_case

    from pinet_fast.kernels.stratified_norm import _triton

    for count, width, strata in ((19, 1100, 4), (7, 5000, 2), (300, 70, 64)):
        assert not _triton.is_fused(strata, width, torch.float32)
        case = make_case(count, width, strata)
        outs = outputs(case, True, True, True)
        _triton.run(*case.arguments()[:-1], *outs)
        assert_close(outs, case)


def check_only_what_is_needed_is_written():
    from stratified_norm_cases import assert_close, make_case

    from pinet_fast.kernels.stratified_norm import _triton

    for width in (6, 1500):
        case = make_case(80, width, 3)
        whole = outputs(case, True, True, True)
        _triton.run(*case.arguments()[:-1], *whole)
        for needs in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)):
            outs = outputs(case, *needs)
            _triton.run(*case.arguments()[:-1], *outs)
            assert_close(outs, case)
            for out, right in zip(outs, whole, strict=True):
                assert out is None or torch.equal(out, right)


def check_several_chunks_in_any_order_of_programs():
    from stratified_norm_cases import assert_close, make_case

    from pinet_fast.kernels.stratified_norm import _triton

    for count, width in ((1300, 70), (60, 1500)):
        case = make_case(count, width, 5)
        case.ids[case.ids == 4] = 3  # an empty stratum
        case.ids[0] = 2
        case.ids[1:][case.ids[1:] == 2] = 1  # a stratum of one row
        results = []
        for reverse in (False, True, False):
            outs = outputs(case, True, True, True)
            _triton.run(*case.arguments()[:-1], *outs, reverse=reverse)
            results.append(outs)
        assert_close(results[0], case)
        assert (results[0][1][4] == 0).all()
        assert torch.equal(results[0][2][2], case.grad[0])
        for outs in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outs, results[0], strict=True))


def check_reads_and_writes_nothing_outside_and_fills_its_scratch():
    from interpreter_checks import assert_guards_hold, guarded, poisoned_scratch, surrounded
    from stratified_norm_cases import assert_close, make_case

    from pinet_fast.kernels.stratified_norm import _triton

    for count, width, strata in ((1, 1, 1), (33, 7, 3), (200, 65, 9), (9, 1030, 5)):
        case = make_case(count, width, strata)
        case.grad, case.rows = surrounded(case.grad), surrounded(case.rows)
        shapes = ((count, width), (strata, width), (strata, width))
        outs, wholes = zip(*(guarded(*shape) for shape in shapes), strict=True)
        with poisoned_scratch() as scratch:
            _triton.run(*case.arguments()[:-1], *outs)
        assert scratch
        assert_close(outs, case)
        for whole in wholes:
            assert_guards_hold(whole)


def check_a_bad_number_stays_in_its_row_and_its_stratum():
    from stratified_norm_cases import make_case

    from pinet_fast.kernels import stratified_norm_backward

    for width, strata in ((9, 4), (1100, 4)):
        case = make_case(100, width, strata)
        case.grad[77, 5] = torch.nan
        got = stratified_norm_backward(*case.arguments(), backend="triton")
        assert got[0].isnan().any(1).nonzero().flatten().tolist() == [77]
        for out in got[1:]:
            assert out.isnan().nonzero().tolist() == [[case.ids[77].item(), 5]]


def check_what_is_unsupported_has_a_reason():
    from stratified_norm_cases import make_case

    from pinet_fast.errors import BackendUnavailableError
    from pinet_fast.kernels import stratified_norm_backward

    for case, reason in (
        (make_case(3, 4, 65), "65 strata are more than 64"),
        (make_case(1, 16385, 2), "rows of 16385 numbers are longer than 16384"),
        (make_case(1, 4097, 2, dtype=torch.float64), "rows of 4097 numbers are longer than 4096"),
    ):
        with pytest.raises(BackendUnavailableError, match=reason):
            stratified_norm_backward(*case.arguments(), backend="triton")


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.interpret
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_the_interpreter(passed, check):
    assert check in passed


if __name__ == "__main__":
    from interpreter_checks import run_checks

    run_checks(CHECKS)
