"""Backdoor adjustment with a fixed prior over activeness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pinet_fast.aggregation.rules.base import BatchStrata, ConstantRule
from pinet_fast.errors import ConfigError, StrataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Backdoor(ConstantRule):
    """Backdoor adjustment ``g_do = sum_z P(z) E[grad l | z]`` over activeness z.

    P(z) is a choice about the population, not a trace of the log. With one loss per user and
    batches that mirror the population, ``prior="users"`` equals the plain mean over users and
    changes nothing.

    Args:
        prior: ``"uniform"`` counts every stratum alike (default); ``"users"`` and ``"events"``
            weigh strata by their users or training events in the population, which must then be
            known; or S non-negative numbers, scaled to sum to one.

    Raises:
        ConfigError: An unknown prior, or numbers that are negative or sum to zero.

    Source:
        arXiv 2208.09130, the backdoor adjustment of its abstract; that P(z) is uniform by default
        is our reading.
    """

    claims = frozenset({"convex", "scale_invariant", "mean"})

    def __init__(self, prior: str | Sequence[float] | Tensor = "uniform") -> None:
        self.prior: str | tuple[float, ...]
        if isinstance(prior, str):
            if prior not in ("uniform", "users", "events"):
                raise ConfigError(
                    'Backdoor: expected prior "uniform", "users", "events" or one number a '
                    f"stratum; got {prior!r}"
                )
            self.prior = prior
        else:
            self.prior = tuple(float(p) for p in prior)
            bad = not self.prior or not all(p >= 0 for p in self.prior)
            if bad or not 0 < sum(self.prior) < float("inf"):
                raise ConfigError(
                    "Backdoor: the prior must hold numbers >= 0 with a finite sum above 0; got "
                    f"{list(self.prior)}"
                )

    def weights(self, batch: BatchStrata) -> tuple[float, ...]:
        """Return P(z), renormalised over the strata that are present where the batch says so.

        Raises:
            StrataError: The population counts are unknown, or the prior has another size.
        """
        prior = self._prior(batch)
        kept = [p if here else 0.0 for p, here in zip(prior, batch.present, strict=True)]
        total = sum(kept)
        if total <= 0:
            raise StrataError(
                f"Backdoor: the prior {list(prior)} gives no weight to the strata of this batch "
                f"(rows {list(batch.counts)})"
            )
        scale = total if batch.renormalise else sum(prior)
        return tuple(p / scale for p in kept)

    def _prior(self, batch: BatchStrata) -> Sequence[float]:
        num_strata = len(batch.counts)
        if self.prior == "uniform":
            return [1.0] * num_strata
        if isinstance(self.prior, str):
            counts = batch.user_counts if self.prior == "users" else batch.event_counts
            if counts is None:
                raise StrataError(
                    f'Backdoor(prior="{self.prior}") needs the {self.prior} of every stratum in '
                    "the population: pass a StrataIndex that carries them (the loader's does) or "
                    "GradientAggregator(..., counts=[...])"
                )
            return [float(c) for c in counts]
        if len(self.prior) != num_strata:
            raise StrataError(
                f"Backdoor: the prior has {len(self.prior)} numbers but there are {num_strata} "
                "strata"
            )
        return self.prior

    def __repr__(self) -> str:
        return f"Backdoor(prior={self.prior!r})"
