"""Joint training: the base model's own loss, for comparison."""

from __future__ import annotations

from pinet_fast.aggregation.rules.base import BatchStrata, ConstantRule


class Joint(ConstantRule):
    """Weigh strata by their rows in the batch: the plain mean over all loss rows.

    ``g = sum_s (n_s / n) g_s``. With one loss per event, head users count by their events; this is
    what training without strata does.
    """

    claims = frozenset({"convex", "scale_invariant", "mean"})

    def weights(self, batch: BatchStrata) -> tuple[float, ...]:
        """Return ``n_s / n``."""
        total = sum(batch.counts)
        return tuple(count / total for count in batch.counts)

    def __repr__(self) -> str:
        return "Joint()"
