"""The Triton backend in Triton's interpreter, in a process of its own.

Run as a script, this file is that process: it prints a line per check.
"""

from __future__ import annotations

import pytest
import torch

# On a GPU up to 256 rows are summed in float32: 13 roundings one after the other.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 2e-15, torch.float16: 1e-6, torch.bfloat16: 1e-6}


@pytest.fixture(scope="module")
def passed(interpreted):
    """Return the names of the checks that passed in the process with the interpreter."""
    return interpreted(__file__)


def assert_right(out, rows, ids, strata):
    import stratum_sums_cases as cases

    cases.TOLERANCE = TOLERANCE
    cases.assert_close(out, rows, ids, strata)
    present = torch.zeros(strata, dtype=torch.bool).index_fill(0, ids, True)
    assert (out[~present] == 0).all()


def check_agrees_with_the_oracle():
    from stratum_sums_cases import LAYOUTS, make_ids, make_rows

    from pinet_fast.kernels import _registry, stratum_sums

    generator = torch.Generator().manual_seed(0)
    dtypes = list(TOLERANCE)
    sizes = [(0, 4, 2), (1, 1, 1), (33, 5, 3), (70, 64, 8), (300, 17, 5), (20, 130, 64), (6, 0, 2)]
    for i, (count, width, strata) in enumerate(sizes):
        for k, layout in enumerate(LAYOUTS):
            rows = make_rows(count, width, layout, dtypes[(i + k) % 4], generator)
            ids = make_ids(count, strata, "sorted" if k % 2 else "any", generator)
            assert_right(stratum_sums(rows, ids, strata, backend="triton"), rows, ids, strata)
    assert _registry.num_calls("stratum_sums", "triton") == len(sizes) * len(LAYOUTS)


def check_several_chunks_in_any_order_of_programs():
    from pinet_fast.kernels.stratum_sums import _triton

    rows, ids = torch.randn(1100, 70), torch.randint(0, 6, (1100,))
    ids[ids == 4] = 5  # an empty stratum
    ids[0] = 3
    ids[1:][ids[1:] == 3] = 2  # a stratum of one row
    outs = [torch.full((6, 70), torch.nan) for _ in range(3)]
    for out, reverse in zip(outs, (False, True, False), strict=True):
        _triton.run(rows, ids, out, reverse=reverse)
    assert_right(outs[0], rows, ids, 6)
    assert torch.equal(outs[0][3], rows[0])
    assert all(torch.equal(out, outs[0]) for out in outs)


def check_reads_and_writes_nothing_outside_and_fills_its_scratch():
    from interpreter_checks import assert_guards_hold, guarded, poisoned_scratch, surrounded

    from pinet_fast.kernels.stratum_sums import _triton

    for count, width, strata in ((1, 1, 1), (31, 7, 3), (257, 65, 9)):
        rows, ids = surrounded(torch.randn(count, width)), torch.randint(0, strata, (count,))
        out, whole = guarded(strata, width)
        with poisoned_scratch() as scratch:
            _triton.run(rows, ids, out)
        assert scratch
        assert_right(out, rows, ids, strata)
        assert_guards_hold(whole)


def check_a_bad_number_stays_in_the_column_of_its_stratum():
    from pinet_fast.kernels import stratum_sums

    ids = torch.randint(0, 4, (300,))
    for bad in (torch.nan, torch.inf):
        rows = torch.randn(300, 9)
        rows[77, 5] = bad
        out = stratum_sums(rows, ids, 4, backend="triton")
        assert (~out.isfinite()).nonzero().tolist() == [[ids[77].item(), 5]]


def check_rows_of_ids_out_of_range_count_nowhere():
    from pinet_fast.kernels import stratum_sums

    rows, ids = torch.randn(40, 3), torch.randint(0, 3, (40,))
    spoilt = ids.clone()
    spoilt[[3, 17, 39]] = torch.tensor([-1, 3, 2**40])
    kept = spoilt == ids
    out = stratum_sums(rows, spoilt, 3, backend="triton")
    assert_right(out, rows[kept], ids[kept], 3)


def check_what_is_unsupported_has_a_reason():
    from pinet_fast.errors import BackendUnavailableError
    from pinet_fast.kernels import stratum_sums

    with pytest.raises(BackendUnavailableError, match="65 strata are more than 64"):
        stratum_sums(torch.randn(2, 3), torch.tensor([0, 64]), 65, backend="triton")


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.interpret
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_the_interpreter(passed, check):
    assert check in passed


if __name__ == "__main__":
    from interpreter_checks import run_checks

    run_checks(CHECKS)
