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


def check_agrees_with_the_oracle():
    from stratum_gram_cases import LAYOUTS, assert_close, make_grad

    from pinet_fast.kernels import _registry, stratum_gram

    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for i, strata in enumerate((1, 2, 3, 5, 8, 9, 16)):
        for dtype in (dtypes[i % 4], torch.float32):
            shapes = [(strata, 3, 5), (strata, 0), (strata,), (strata, 2500), (strata, 64, 4)]
            grads = [
                make_grad(shape, LAYOUTS[(i + k) % 5], dtype, generator)
                for k, shape in enumerate(shapes)
            ]
            assert_close(stratum_gram(grads, backend="triton"), grads)
    assert _registry.num_calls("stratum_gram", "triton") == 14


def check_several_chunks_and_reverse_order():
    from stratum_gram_cases import assert_close

    from pinet_fast.kernels.stratum_gram import _triton

    grads = [torch.randn(8, 20_011), torch.randn(8, 8192 + 1), torch.randn(8, 3)]
    out = torch.full((3, 8, 8), torch.nan, dtype=torch.float64)
    _triton.run(grads, out)
    assert_close(out, grads)
    reverse = torch.full((3, 8, 8), torch.nan, dtype=torch.float64)
    _triton.run(grads, reverse, reverse=True)
    assert torch.equal(out, reverse)


def check_reads_and_writes_nothing_outside():
    from stratum_gram_cases import assert_close

    from pinet_fast.kernels.stratum_gram import _triton

    for strata, columns in ((3, 1), (5, 255), (8, 257), (9, 700)):
        # NaN before, between and after the rows: reading one of them would show in the result.
        wide = torch.full((strata + 2, columns + 16), torch.nan)
        grad = wide[1:-1, 8 : columns + 8]
        grad.copy_(torch.randn(strata, columns))
        guarded = torch.full((3, strata, strata), torch.nan, dtype=torch.float64)
        _triton.run([grad], guarded[1:2])
        assert_close(guarded[1:2], [grad])
        assert guarded[0].isnan().all()
        assert guarded[2].isnan().all()


def check_fills_its_partial_sums():
    from stratum_gram_cases import assert_close

    from pinet_fast.kernels.stratum_gram import _triton

    empty, poisoned = torch.empty, []

    def poisoned_empty(*args, **kwargs):
        poisoned.append(empty(*args, **kwargs))
        return poisoned[-1].fill_(torch.nan) if poisoned[-1].is_floating_point() else poisoned[-1]

    torch.empty = poisoned_empty
    try:
        grads = [torch.randn(3, 40_000), torch.empty(3, 0), torch.randn(3, 5)]
        out = torch.full((3, 3, 3), torch.nan, dtype=torch.float64)
        _triton.run(grads, out)
    finally:
        torch.empty = empty
    assert len(poisoned) >= 2
    assert_close(out, grads)


def check_bad_numbers_stay_in_their_row_and_column():
    from pinet_fast.kernels import stratum_gram

    for bad in (torch.nan, torch.inf):
        grad = torch.randn(5, 600)
        grad[2, 300] = bad
        out = stratum_gram([grad], backend="triton")[0]
        touched = torch.zeros(5, 5, dtype=torch.bool)
        touched[2] = touched[:, 2] = True
        assert torch.equal(~out.isfinite(), touched)


def check_what_is_unsupported_has_a_reason():
    from pinet_fast.errors import BackendUnavailableError
    from pinet_fast.kernels import stratum_gram

    for grads, reason in (
        ([torch.randn(17, 3)], "17 strata are more than 16"),
        ([torch.randn(2, 3), torch.randn(2, 3).double()], "several dtypes"),
    ):
        with pytest.raises(BackendUnavailableError, match=reason):
            stratum_gram(grads, backend="triton")


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
