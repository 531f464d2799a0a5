"""The sampler and the negatives of a run, from its options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pinet_fast.data import Negatives, StratifiedBatchSampler
from pinet_fast.training.mixes import mix_of

if TYPE_CHECKING:
    from pinet_fast.data import FrozenNegatives, Strata
    from pinet_fast.data.splits import Part
    from pinet_fast.training.config import RunConfig
    from pinet_fast.training.inputs import Inputs


def sampler_of(config: RunConfig, strata: Strata, seed: int) -> StratifiedBatchSampler:
    """Return the sampler of a run.

    Args:
        config: The options.
        strata: The strata.
        seed: Decides the order of users.

    Raises:
        ConfigError: The mix does not fit the strata, or ``max_events`` a user.
    """
    limit = config.max_events or None
    return StratifiedBatchSampler(
        strata,
        batch_size=None if limit else config.batch_size,
        max_events=limit,
        mix=mix_of(config.mix),
        seed=seed,
        max_len=config.max_len if limit else None,
    )


def negatives_of(config: RunConfig) -> Negatives | None:
    """Return the negatives that the loss needs, or None."""
    if config.loss == "ce":
        return None
    return Negatives(
        config.negatives,
        exclude=config.negatives_exclude,  # type: ignore[arg-type] # checked by RunConfig
        per=config.negatives_per,  # type: ignore[arg-type]
        dist=config.negatives_dist,  # type: ignore[arg-type]
        alpha=config.negatives_alpha,
        log_q=config.loss == "ss",
    )


def frozen_negatives_of(config: RunConfig, inputs: Inputs, part: Part) -> FrozenNegatives | None:
    """Return the negatives that held-out items are ranked against; None for the catalogue."""
    if not config.eval_negatives:
        return None
    options = Negatives(
        config.eval_negatives,
        per="user",
        dist=config.eval_dist,  # type: ignore[arg-type] # checked by RunConfig
    )
    return options.frozen(inputs.store, inputs.split, part=part)
