"""Records and facts as log.jsonl and metrics.json hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pinet_fast.data import SequenceStore, Strata
    from pinet_fast.training.stages import Stage


def data_facts(store: SequenceStore) -> dict[str, Any]:
    """Return what is known of the log."""
    ties = store.time_ties
    return {
        "name": store.source,
        "fingerprint": store.fingerprint,
        "simulated": store.simulated,
        "users": store.num_users,
        "items": store.num_items,
        "events": store.num_events,
        "time_ties": None if ties is None else ties / store.num_users,
    }


def strata_facts(strata: Strata) -> list[dict[str, Any]]:
    """Return one row a stratum: users, training events and their range per user."""
    facts = []
    for s, name in enumerate(strata.names):
        activeness = strata.activeness[strata.ids == s]
        facts.append(
            {
                "id": s,
                "name": name,
                "users": int(strata.user_counts[s]),
                "events": int(strata.event_counts[s]),
                "min_activeness": int(activeness.min()),
                "max_activeness": int(activeness.max()),
            }
        )
    return facts


def step_record(stage: Stage, loss: float) -> dict[str, Any]:
    """Return a step's record for log.jsonl."""
    report = stage.optimizer.report
    weights = report.weights
    if weights is not None and weights.dim() == 2:
        weights = weights.mean(0)  # per-parameter rules: the mean over parameters
    return {
        "event": "step",
        "stage": stage.name,
        "epoch": stage.epoch + 1,
        "step": stage.step,
        "loss": loss,
        "stratum_losses": _listed(report.losses),
        "weights": _listed(weights),
        "norms": _listed(report.norms),
        "cosines": _listed(report.cosines),
        "counts": list(report.counts),
        "events_per_second": stage.events / stage.seconds if stage.seconds else None,
    }


def _listed(values: Tensor | None) -> Any:
    return None if values is None else values.tolist()
