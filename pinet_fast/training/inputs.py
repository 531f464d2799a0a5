"""The log of a run: prepared, split, and divided into strata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pinet_fast.data import SequenceStore, Split, Strata, prepare
from pinet_fast.training.records import strata_facts

if TYPE_CHECKING:
    from pinet_fast.training.config import RunConfig
    from pinet_fast.training.observer import Observer


@dataclass(frozen=True)
class Inputs:
    """The log as a run uses it."""

    store: SequenceStore
    split: Split
    strata: Strata


def load_inputs(config: RunConfig, observer: Observer) -> Inputs:
    """Prepare the store (once a log) and cut the strata.

    Raises:
        DataError: The log cannot be used.
        StrataError: The strata cannot be cut as asked.
    """
    store = prepare(
        config.data,
        user=config.user_col,
        item=config.item_col,
        timestamp=config.time_col,
        order=config.order,  # type: ignore[arg-type] # checked by RunConfig
    )
    split = Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges=config.strata)
    observer.note(
        f"{store.source}: {store.num_users:,} users, {store.num_items:,} items, "
        f"{store.num_events:,} events" + (" - SIMULATED" if store.simulated else "")
    )
    for stratum in strata_facts(strata):
        observer.note(
            f"stratum {stratum['id']} ({stratum['name']}): {stratum['users']:,} users with "
            f"{stratum['min_activeness']} to {stratum['max_activeness']} training events"
        )
    return Inputs(store, split, strata)
