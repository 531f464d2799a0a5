"""Shares of strata as the command line and config.json write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pinet_fast.errors import ConfigError

NAMED = ("proportional", "uniform", "sqrt")

Mix = str | Mapping[int | str, float] | Sequence[float]


def mix_of(text: str) -> Mix:
    """Return what ``StratifiedBatchSampler(mix=...)`` takes.

    Args:
        text: ``"proportional"``, ``"uniform"``, ``"sqrt"``, shares ``"0.5,0.5"`` in order of the
            strata, or ``"tail=0.5,head=0.5"`` by name or number.

    Raises:
        ConfigError: None of these. That names and sums fit the strata is checked by the sampler.
    """
    if text in NAMED:
        return text
    parts = [part.strip() for part in text.split(",")]
    keys, shares = [], []
    for part in parts:
        key, equals, share = part.rpartition("=")
        try:
            shares.append(float(share))
        except ValueError:
            raise _unknown(text) from None
        if equals:
            keys.append(int(key) if key.strip().isdecimal() else key.strip())
    if not keys:
        return shares
    if len(keys) < len(parts):
        raise _unknown(text)
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--mix {text}: a stratum is given twice; give it once")
    return dict(zip(keys, shares, strict=True))


def _unknown(text: str) -> ConfigError:
    return ConfigError(
        f"--mix: expected {', '.join(NAMED)}, shares such as 0.5,0.5, or tail=0.5,head=0.5; "
        f"got {text!r}"
    )
