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


def mixed_case(strata, seed, dtype=torch.float32, out_dtype=None, accumulate=False):
    from stratum_combine_cases import LAYOUTS, OUT_LAYOUTS, Case

    case = Case(strata, torch.Generator().manual_seed(seed))
    for i, shape in enumerate([(3, 5), (0,), (), (2500,), (64, 9), (4096,), (5000,)]):
        case.add(
            shape, LAYOUTS[(seed + i) % 5], OUT_LAYOUTS[(seed + i) % 3], dtype, out_dtype,
            accumulate=accumulate if i % 2 else not accumulate,
        )  # fmt: skip
    for i, width in enumerate((1, 5, 64)):
        rows = list(range(i, 90, 2 + i))
        case.add(
            (len(rows), width), LAYOUTS[i], OUT_LAYOUTS[i], dtype, out_dtype,
            accumulate=bool(i % 2), rows=rows, num_rows=100,
        )  # fmt: skip
    return case.add((0, 4), dtype=dtype, out_dtype=out_dtype, rows=[], num_rows=3)


def run(case, weights, scale=None):
    from pinet_fast.kernels import stratum_combine

    stratum_combine(
        case.grads, weights, case.outs, scale=scale, accumulate=case.accumulate, rows=case.rows,
        backend="triton",
    )  # fmt: skip


def check_agrees_with_the_oracle():
    from stratum_combine_cases import assert_close, oracle

    from pinet_fast.kernels import _registry

    for i, strata in enumerate((1, 2, 3, 8)):
        dtype = (torch.float32, torch.float64, torch.float16, torch.bfloat16)[i]
        for out_dtype in (dtype, torch.float32):
            case = mixed_case(strata, i, dtype, out_dtype)
            weights = case.weights(per_parameter=i % 2 == 0)
            scale = torch.tensor(0.3).double() if i % 2 else None
            expected = oracle(case, weights, scale)
            run(case, weights, scale)
            assert_close(case, *expected)
    assert _registry.num_calls("stratum_combine", "triton") == 8


def check_reverse_order_of_programs():
    from pinet_fast.kernels.stratum_combine import _triton

    results = []
    for reverse in (False, True):
        case = mixed_case(3, 5)
        weights = case.weights(per_parameter=True)
        _triton.run(case.grads, weights, case.outs, None, case.accumulate, case.rows, reverse)
        results.append(case.outs)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_a_stratum_without_weight_is_not_read():
    from stratum_combine_cases import assert_close, oracle

    for bad in (torch.nan, torch.inf):
        case = mixed_case(3, 0)
        weights = case.weights()
        expected = oracle(case, weights)
        for grad in case.grads:
            if grad.stride(0) != 0:
                grad[1] = bad
        run(case, weights)
        assert_close(case, *expected)


def check_any_other_weight_lets_bad_numbers_through():
    from pinet_fast.kernels import stratum_combine

    grad, out = torch.ones(2, 5), torch.empty(5)
    grad[1, 2] = torch.nan
    for w in (1.0, 1e-300):
        weights = torch.tensor([1.0, w], dtype=torch.float64)
        stratum_combine([grad], weights, [out], backend="triton")
        assert out.isnan().tolist() == [False, False, True, False, False]
    weights[1] = torch.nan
    stratum_combine([grad], weights, [out], backend="triton")
    assert out.isnan().all()


def check_nothing_to_add():
    from stratum_combine_cases import Case

    case = Case(2, torch.Generator()).add((9,)).add((9,), accumulate=True)
    case.add((2, 3), rows=[0, 2], num_rows=4)
    before = case.outs[1].clone()
    run(case, torch.zeros(2, dtype=torch.float64), torch.tensor(torch.nan).double())
    assert torch.equal(case.outs[0], torch.zeros(9))
    assert torch.equal(case.outs[1], before)
    assert torch.equal(case.outs[2], torch.zeros(4, 3))


def check_reads_and_writes_nothing_outside():
    from pinet_fast.kernels import stratum_combine

    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for columns in (1, 255, 1024, 1025, 4100):
        wide = torch.full((5, columns + 16), torch.nan)
        grad = wide[1:-1, 8 : columns + 8]
        grad.copy_(torch.randn(3, columns))
        guarded = torch.full((columns + 16,), torch.nan)
        stratum_combine([grad], weights, [guarded[8:-8]], backend="triton")
        torch.testing.assert_close(guarded[8:-8], grad[0] + 2 * grad[1] + 3 * grad[2])
        assert guarded[:8].isnan().all()
        assert guarded[-8:].isnan().all()


def check_rows_out_of_range_are_dropped():
    from pinet_fast.kernels import stratum_combine

    guarded = torch.full((5, 4), torch.nan)
    rows = torch.tensor([-1, 1, 3])
    grad, one = torch.ones(1, 3, 4), torch.ones(1, dtype=torch.float64)
    stratum_combine([grad], one, [guarded[1:4]], rows=[rows], backend="triton")
    assert guarded[1:4, 0].tolist() == [0, 1, 0]
    assert guarded[0].isnan().all()
    assert guarded[4].isnan().all()


def check_what_is_unsupported_has_a_reason():
    from pinet_fast.errors import BackendUnavailableError

    for dtype, reason in ((torch.float64, "gradients have several dtypes"),):
        case = mixed_case(2, 0).add((3,), dtype=dtype)
        with pytest.raises(BackendUnavailableError, match=reason):
            run(case, case.weights())
    case = mixed_case(2, 0).add((3,), out_dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match="outputs have several dtypes"):
        run(case, case.weights())


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.interpret
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_the_interpreter(passed, check):
    assert check in passed


if __name__ == "__main__":
    torch.manual_seed(0)
    for check in CHECKS:
        check()
        print(check.__name__, flush=True)
