"""The Triton backend in Triton's interpreter, in a process of its own.

Run as a script, this file is that process: it prints a line per check.
"""

from __future__ import annotations

import pytest
import torch

RULES = ("agreement", "balanced", "mgda", "pcgrad", "imtlg", "alignedmtl", "cagrad")


@pytest.fixture(scope="module")
def passed(interpreted):
    """Return the names of the checks that passed in the process with the interpreter."""
    return interpreted(__file__)


def check_agrees_with_the_reference():
    from stratum_solve_cases import assert_solves_alike, make_gram

    from pinet_fast.kernels import _registry, stratum_solve

    calls = 0
    kinds = ("singular", "scaled", "repeated", "integer", "zero", "random", "opposed")
    for i, (strata, kind) in enumerate(zip((1, 2, 3, 5, 3, 8, 4), kinds, strict=True)):
        gram = make_gram(kind, strata, i, (2,) if strata < 4 else ())
        for rule in RULES:
            got = stratum_solve(gram, rule, backend="triton")
            expected = stratum_solve(gram, rule, backend="reference")
            assert_solves_alike(rule, gram, got, expected)
            calls += 1
    assert _registry.num_calls("stratum_solve", "triton") == calls


def check_many_strata():
    from stratum_solve_cases import assert_solves_alike, make_gram

    from pinet_fast.kernels import stratum_solve

    gram = make_gram("random", 32, 0)
    for rule in ("agreement", "balanced"):
        got = stratum_solve(gram, rule, backend="triton")
        assert_solves_alike(rule, gram, got, stratum_solve(gram, rule, backend="reference"))


def check_repeats_are_equal_to_the_bit():
    from stratum_solve_cases import make_gram

    from pinet_fast.kernels import stratum_solve

    gram = make_gram("random", 4, 5)
    for rule in RULES:
        first = stratum_solve(gram, rule, backend="triton")
        assert torch.equal(first, stratum_solve(gram, rule, backend="triton"))


def check_keys_and_radius():
    from stratum_solve_cases import assert_solves_alike, make_gram

    from pinet_fast.kernels import stratum_solve

    gram = make_gram("random", 5, 1, (2,))
    for seed in range(2):
        keys = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)).double()
        keys[:, 2] = keys[:, 4]  # equal ones: by ascending id
        got, expected = (
            stratum_solve(gram, "pcgrad", keys=keys, backend=backend)
            for backend in ("triton", "reference")
        )
        assert_solves_alike("pcgrad", gram, got, expected)
    for c in (0.0, 0.9):
        got, expected = (
            stratum_solve(gram, "cagrad", c=c, backend=backend)
            for backend in ("triton", "reference")
        )
        assert_solves_alike("cagrad", gram, got, expected, c)


def check_absent_strata_are_not_read():
    from stratum_solve_cases import make_gram

    from pinet_fast.kernels import stratum_solve

    for present in ([True, False, True, True], [False, True, False, True], [False] * 3 + [True]):
        gram, absent = make_gram("random", 4, 3), ~torch.tensor(present)
        for rule in RULES:
            gram[absent], gram[:, absent] = 0.0, 0.0
            expected = stratum_solve(gram, rule, present=present, backend="reference")
            gram[absent], gram[:, absent] = torch.nan, torch.inf
            got = stratum_solve(gram, rule, present=present, backend="triton")
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
            assert (got[absent] == 0).all()


def check_overflow_shows_in_its_own_gram_alone():
    from stratum_solve_cases import make_gram

    from pinet_fast.kernels import stratum_solve

    for bad in (torch.nan, -torch.inf):
        gram = make_gram("random", 3, 0, (2,))
        gram[0, 1, 2] = gram[0, 2, 1] = bad
        for rule in RULES:
            got = stratum_solve(gram, rule, backend="triton")
            assert got[0].isnan().all()
            assert got[1].isfinite().all()


def check_cancelling_gradients_weigh_alike():
    from pinet_fast.kernels import stratum_solve

    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert stratum_solve(gram, "agreement", backend="triton").tolist() == [0.5, 0.5]


def check_reads_and_writes_nothing_outside():
    from stratum_solve_cases import make_gram

    from pinet_fast.kernels.stratum_solve import _triton

    for strata in (1, 3):
        wide = torch.full((4, strata, strata), torch.nan, dtype=torch.float64)
        wide[1:3] = make_gram("random", strata, 0, (2,))
        guarded = torch.full((4, strata), torch.nan, dtype=torch.float64)
        for rule in RULES:
            _triton.run(wide[1:3], rule, list(range(strata)), 0.5, None, guarded[1:3])
            assert guarded[1:3].isfinite().all()
            assert guarded[0::3].isnan().all()


def check_what_is_unsupported_has_a_reason():
    from stratum_solve_cases import make_gram

    from pinet_fast.errors import BackendUnavailableError
    from pinet_fast.kernels import stratum_solve

    with pytest.raises(BackendUnavailableError, match="33 strata are more than 32"):
        stratum_solve(make_gram("random", 33, 0), "mgda", backend="triton")


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
