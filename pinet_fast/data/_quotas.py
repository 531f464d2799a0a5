"""Shares of the strata, and how many rows of a stream each of them gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from pinet_fast.errors import ConfigError

Mix = str | Mapping[int | str, float] | Sequence[float]

_NAMED = '"proportional", "uniform" or "sqrt"'
_ROUNDING = 1e-6  # how far from 1 the sum of given shares may be


class Diffusion:
    """Divides a stream of rows among strata, exactly in the long run; no state.

    Error diffusion in closed form. Of two strata with shares p and q, the first has
    ``round(k p / (p + q))`` of the first k rows, the second the others: each row goes to one of
    them, and both stay within half a row of their due. More strata are halved like this in a
    balanced binary tree, so that none is off by more than ceil(log2 S) / 2 rows.

    Args:
        shares: Positive, with the exact sum 1.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        self.num_strata = len(shares)
        level = list(enumerate(shares))
        splits = []
        number = len(shares)
        while len(level) > 1:
            pairs, odd = [], level[len(level) // 2 * 2 :]
            for (left, p), (right, q) in zip(level[::2], level[1::2], strict=False):
                part = p / (p + q)
                splits.append((number, left, right, part.numerator, part.denominator))
                pairs.append((number, p + q))
                number += 1
            level = pairs + odd
        self._splits = splits[::-1]

    def counts(self, num_rows: int) -> list[int]:
        """Return how many of the first ``num_rows`` rows belong to every stratum."""
        counts = [0] * len(self._splits) + [0] * self.num_strata
        counts[-1] = num_rows
        for node, left, right, part, whole in self._splits:
            counts[left] = (2 * counts[node] * part + whole) // (2 * whole)
            counts[right] = counts[node] - counts[left]
        return counts[: self.num_strata]

    def bounds(self) -> list[Fraction]:
        """Return how far the counts may be from share * rows."""
        bounds = [Fraction(0)] * (len(self._splits) + self.num_strata)
        for node, left, right, part, whole in self._splits:
            bounds[left] = Fraction(1, 2) + bounds[node] * part / whole
            bounds[right] = Fraction(1, 2) + bounds[node] * (whole - part) / whole
        return bounds[: self.num_strata]


def shares_of(mix: Mix, names: Sequence[str], counts: Sequence[int]) -> tuple[Fraction, ...]:
    """Return the shares of the strata, exact fractions with the sum 1.

    Args:
        mix: ``"proportional"``, ``"uniform"``, ``"sqrt"`` (by the root of the users), a share for
            every stratum by number or name, or S shares.
        names: Names of the strata.
        counts: Eligible users of the strata.

    Raises:
        ConfigError: Another name, or shares that are not S positive numbers with the sum 1.
    """
    if isinstance(mix, str):
        return _named(mix, counts)
    given = _by_stratum(mix, names) if isinstance(mix, Mapping) else list(mix)
    if len(given) != len(names):
        raise ConfigError(f"mix: expected {len(names)} shares, one a stratum, got {len(given)}")
    shares = [_fraction(share, name) for share, name in zip(given, names, strict=True)]
    total = sum(shares, Fraction(0))
    if abs(total - 1) > _ROUNDING:
        raise ConfigError(f"mix: expected shares with the sum 1, got {float(total):g}; scale them")
    return tuple(share / total for share in shares)


def _named(mix: str, counts: Sequence[int]) -> tuple[Fraction, ...]:
    if mix == "proportional":
        weights = [Fraction(int(count)) for count in counts]
    elif mix == "uniform":
        weights = [Fraction(1)] * len(counts)
    elif mix == "sqrt":
        weights = [Fraction(math.sqrt(count)) for count in counts]
    else:
        raise ConfigError(f"mix: expected {_NAMED}, or a share for every stratum, got {mix!r}")
    total = sum(weights, Fraction(0))
    return tuple(weight / total for weight in weights)


def _by_stratum(mix: Mapping[int | str, float], names: Sequence[str]) -> list[float]:
    shares: dict[int, float] = {}
    for key, share in mix.items():
        s = names.index(key) if isinstance(key, str) and key in names else key
        if isinstance(s, bool) or not isinstance(s, int | np.integer) or not 0 <= s < len(names):
            known = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise ConfigError(f"mix: no stratum {key!r}; expected a number or name of {known}")
        if int(s) in shares:
            raise ConfigError(f"mix: stratum {s} ({names[s]}) is given twice; give it once")
        shares[int(s)] = share
    if missing := [f"{s} ({name})" for s, name in enumerate(names) if s not in shares]:
        raise ConfigError(f"mix: no share for stratum {', '.join(missing)}; give every one a share")
    return [shares[s] for s in range(len(names))]


def _fraction(share: Any, name: str) -> Fraction:
    try:
        fraction = Fraction(str(share))  # 0.3 is 3/10, not the nearest float
    except ValueError:
        fraction = Fraction(0)
    if fraction <= 0:
        raise ConfigError(f"mix: expected a share above 0 for stratum {name}, got {share!r}")
    return fraction
