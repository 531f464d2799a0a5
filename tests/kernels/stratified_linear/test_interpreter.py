"""The Triton backend in Triton's interpreter, in a process of its own.

Run as a script, this file is that process: it prints a line per check.
"""

from __future__ import annotations

import pytest
import torch

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def passed(interpreted):
    """Return the names of the checks that passed in the process with the interpreter."""
    return interpreted(__file__)


def make(count, wide, deep, strata, is_sorted, dtype=torch.float32, layouts=("contiguous",) * 3):
    from stratified_linear_cases import make_matrix, make_strata

    generator = torch.Generator().manual_seed(count)
    shapes = ((count, wide), (count, deep), (wide, deep))
    grad, rows, weight = (
        make_matrix(*shape, layout, dtype, generator)
        for shape, layout in zip(shapes, layouts, strict=True)
    )
    return grad, rows, weight, *make_strata(count, strata, is_sorted, generator)


def assert_right(outs, case):
    """Check the gradients by stratum, which are float32 whatever the rows are, and the first."""
    import stratified_linear_cases as cases

    grad, rows, weight, ids, offsets, _ = case
    strata, dtype = len(offsets) - 1, rows.dtype
    half = dtype in HALVES
    assert [out.dtype for out in outs] == [dtype, *[torch.float32 if half else dtype] * 2]
    if not half:
        cases.assert_close(outs, grad, rows, weight, ids, strata)
        return
    wide = [x.float() for x in (grad, rows, weight)]
    right = cases.oracle(*wide, ids, strata)[0]
    size = cases.oracle(*(x.abs() for x in wide), ids, strata)[0]
    allowed = cases.rounding(dtype, 1) * size
    assert ((outs[0].double() - right).abs() <= allowed).all()
    cases.assert_close((right.float(), *outs[1:]), *wide, ids, strata)


def check_agrees_with_the_oracle():
    from stratified_linear_cases import LAYOUTS

    from pinet_fast.kernels import _registry, stratified_linear_backward

    dtypes = (torch.float32, *HALVES)
    sizes = [(0, 4, 5, 2), (1, 1, 1, 1), (70, 5, 33, 3), (400, 24, 17, 4), (150, 65, 64, 9)]
    for i, (count, wide, deep, strata) in enumerate(sizes):
        for k in range(5):
            layouts = (LAYOUTS[k], LAYOUTS[(k + i) % 5], LAYOUTS[(k + 2) % 5])
            case = make(count, wide, deep, strata, k % 2 == 0, dtypes[(i + k) % 3], layouts)
            assert_right(stratified_linear_backward(*case, backend="triton"), case)
    calls = _registry.num_calls("stratified_linear_backward", "triton")
    assert calls == 5 * len(sizes)


def check_several_tasks_and_tiles_in_any_order_of_programs():
    from pinet_fast.kernels.stratified_linear import _triton

    for is_sorted in (True, False):
        case = make(1500, 70, 130, 4, is_sorted)
        results = []
        for reverse in (False, True, False):
            outs = [torch.full(s, torch.nan) for s in ((1500, 130), (4, 70, 130), (4, 70))]
            _triton.run(*case, *outs, reverse=reverse)
            results.append(outs)
        assert_right(results[0], case)
        for outs in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outs, results[0], strict=True))


def check_every_row_has_one_task():
    from pinet_fast.kernels.stratified_linear._triton import plan

    offsets = (0, 0, 1, 65, 193, 193)
    tasks, first, num_tasks = plan(offsets, 64, torch.device("cpu"))
    assert first.tolist() == [0, 1, 2, 3, 5, 6]
    assert num_tasks == 6
    assert tasks.tolist() == [
        [0, 0, 0], [0, 1, 1], [1, 65, 2], [65, 129, 3], [129, 193, 3], [193, 193, 4],
    ]  # fmt: skip


def check_reads_and_writes_nothing_outside_and_fills_its_scratch():
    from interpreter_checks import assert_guards_hold, guarded, poisoned_scratch, surrounded

    from pinet_fast.kernels.stratified_linear import _triton

    for count, wide, deep, strata in ((1, 1, 1, 1), (33, 7, 20, 3), (600, 17, 65, 9)):
        for is_sorted in (True, False):
            grad, rows, *others = make(count, wide, deep, strata, is_sorted)
            case = (surrounded(grad), surrounded(rows), *others)
            shapes = ((count, deep), (strata, wide, deep), (strata, wide))
            outs, wholes = zip(*(guarded(*shape) for shape in shapes), strict=True)
            with poisoned_scratch() as scratch:
                _triton.run(*case, *outs)
            assert scratch or count < 600  # one task a stratum: slots are the result
            assert_right(outs, case)
            for whole in wholes:
                assert_guards_hold(whole)


def check_only_what_is_needed_is_written():
    from pinet_fast.kernels import stratified_linear_backward

    grad, rows, weight, *strata = make(300, 9, 20, 3, False)
    whole = stratified_linear_backward(grad, rows, weight, *strata, backend="triton")
    for needs in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)):
        names = ("need_rows", "need_weight", "need_bias")
        outs = stratified_linear_backward(
            grad, rows, weight if needs[0] else None, *strata, backend="triton",
            **{name: bool(need) for name, need in zip(names, needs, strict=True)},
        )  # fmt: skip
        for i, (out, right) in enumerate(zip(outs, whole, strict=True)):
            assert (out is not None) == bool(needs[i])
            if out is not None:  # the bias alone is summed by stratum_sums, in another order
                torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-4)
                assert needs == (0, 0, 1) or torch.equal(out, right)


def check_bad_numbers_stay_and_empty_and_one_row_strata_are_exact():
    from pinet_fast.kernels import stratified_linear_backward

    grad, rows, weight, ids, offsets, order = make(500, 24, 17, 4, False)
    grad[123, 5] = torch.nan
    outs = stratified_linear_backward(grad, rows, weight, ids, offsets, order, backend="triton")
    touched = torch.zeros(4, 24, dtype=torch.bool)
    touched[ids[123], 5] = True
    assert torch.equal(outs[1].isnan().all(2), touched)
    assert torch.equal(outs[1].isnan().any(2), touched)
    assert torch.equal(outs[2].isnan(), touched)
    grad, rows, weight, *_ = make(2, 24, 17, 1, True)
    outs = stratified_linear_backward(
        grad, rows, weight, torch.tensor([1, 3]), (0, 0, 1, 1, 2), backend="triton"
    )
    assert (outs[1][[0, 2]] == 0).all()
    assert (outs[2][[0, 2]] == 0).all()
    assert torch.equal(outs[1][[1, 3]], grad.unsqueeze(2) * rows.unsqueeze(1))
    assert torch.equal(outs[2][[1, 3]], grad)


def check_tf32_rounds_to_the_nearest_of_ten_bits():
    from stratified_linear_cases import assert_close, oracle

    from pinet_fast.kernels import stratified_linear_backward

    case = make(200, 20, 24, 3, True)
    grad, rows, weight, ids, offsets, _ = case
    outs = stratified_linear_backward(*case, precision="tf32", backend="triton")

    def rounded(x):
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp((mantissa * 2**11).round(), exponent - 11).float()

    near = [rounded(x) for x in (grad, rows)]
    right = oracle(*near, weight, ids, len(offsets) - 1)
    assert_close((right[0], outs[1], right[2]), *near, weight, ids, len(offsets) - 1)
    exact = stratified_linear_backward(*case, precision="tf32x3", backend="triton")
    assert not torch.equal(outs[1], exact[1])
    assert_right(exact, case)
    grad[7, 3] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]  # a NaN
    outs = stratified_linear_backward(*case, precision="tf32", backend="triton")
    assert outs[1][ids[7], 3].isnan().all()


def check_precision_is_that_of_float32_alone():
    from pinet_fast.kernels import stratified_linear_backward
    from pinet_fast.kernels.stratified_linear import _triton

    seen = []
    launch_options = _triton.launch_options
    _triton.launch_options = lambda *args, **kwargs: (
        seen.append(args[3]) or launch_options(*args, **kwargs)
    )
    try:
        for dtype in (torch.float32, *HALVES):
            case = make(30, 6, 9, 3, True, dtype)
            stratified_linear_backward(*case, precision="tf32", backend="triton")
    finally:
        _triton.launch_options = launch_options
    assert seen == ["tf32", "ieee", "ieee"]  # a GPU cannot round 16 bits as it does float32


def check_what_is_unsupported_has_a_reason():
    from pinet_fast.errors import BackendUnavailableError
    from pinet_fast.kernels import stratified_linear_backward

    case = make(5, 2, 3, 2, True, torch.float64)
    with pytest.raises(BackendUnavailableError, match="no Triton kernel for float64"):
        stratified_linear_backward(*case, backend="triton")


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.interpret
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_the_interpreter(passed, check):
    assert check in passed


if __name__ == "__main__":
    from interpreter_checks import run_checks

    run_checks(CHECKS)
