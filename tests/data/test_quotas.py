from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinet_fast.data._quotas import Diffusion, shares_of
from pinet_fast.errors import ConfigError

NAMES = ("tail", "middle", "head")
WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=8)


def shares(weights):
    return [Fraction(weight, sum(weights)) for weight in weights]


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS, first=st.integers(0, 2**45), rows=st.integers(1, 60))
def test_each_row_goes_to_one_stratum_and_none_runs_off(weights, first, rows):
    diffusion = Diffusion(shares(weights))
    before = diffusion.counts(first)
    for row in range(first + 1, first + rows + 1):
        after = diffusion.counts(row)
        assert sum(after) == row
        assert sorted(b - a for a, b in zip(before, after, strict=True))[-2:] in ([0, 1], [1])
        for count, share, bound in zip(after, shares(weights), diffusion.bounds(), strict=True):
            assert abs(count - share * row) <= bound
        before = after


@settings(deadline=None, max_examples=50)
@given(weights=WEIGHTS)
def test_bounds_grow_with_the_logarithm_of_the_strata(weights):
    bounds = Diffusion(shares(weights)).bounds()
    assert len(bounds) == len(weights)
    assert max(bounds) <= Fraction((len(weights) - 1).bit_length(), 2)


def test_whole_periods_are_exact():
    diffusion = Diffusion(shares([1, 2, 3, 4]))
    for periods in (1, 7, 10**12):
        assert diffusion.counts(10 * periods) == [periods, 2 * periods, 3 * periods, 4 * periods]


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ("proportional", ["1/26", "9/26", "16/26"]),
        ("uniform", ["1/3", "1/3", "1/3"]),
        ("sqrt", ["1/8", "3/8", "4/8"]),
        ([0.1, 0.2, 0.7], ["1/10", "2/10", "7/10"]),
        ((1 / 3, 1 / 3, 1 / 3), ["1/3", "1/3", "1/3"]),
        (np.array([0.5, 0.25, 0.25]), ["1/2", "1/4", "1/4"]),
        ({"head": 0.5, 0: 0.3, np.int64(1): 0.2}, ["3/10", "2/10", "1/2"]),
    ],
)
def test_shares_are_exact(mix, expected):
    found = shares_of(mix, NAMES, [1, 9, 16])
    assert sum(found) == 1
    assert list(found) == [Fraction(share) for share in expected]


@pytest.mark.parametrize(
    ("mix", "match"),
    [
        ("head", 'expected "proportional", "uniform" or "sqrt", or a share'),
        ([0.5, 0.5], "expected 3 shares, one a stratum, got 2"),
        ([0.5, 0.5, 0.5], "with the sum 1, got 1.5; scale them"),
        ([0.5, 0.5, 0], "share above 0 for stratum head, got 0"),
        ([0.5, 0.6, -0.1], "share above 0 for stratum head"),
        ([0.5, 0.5, float("nan")], "share above 0"),
        ([0.5, 0.5, None], "share above 0"),
        ({"tail": 0.5, "head": 0.5}, r"no share for stratum 1 \(middle\)"),
        ({"tail": 0.5, "heads": 0.5}, r"no stratum 'heads'; expected .*2 \(head\)"),
        ({0: 0.5, 3: 0.5}, "no stratum 3"),
        ({0: 0.5, True: 0.5}, "no stratum True"),
        ({0: 0.2, "tail": 0.3, 1: 0.3, 2: 0.2}, "given twice"),
    ],
)
def test_bad_mixes_are_refused_in_one_line(mix, match):
    with pytest.raises(ConfigError, match=match) as caught:
        shares_of(mix, NAMES, [1, 2, 3])
    assert "\n" not in str(caught.value)
