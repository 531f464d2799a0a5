"""Builds the part of a ragged batch that training and evaluation share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from pinet_fast.aggregation.strata_index import StrataIndex
from pinet_fast.data.batch import RaggedBatch
from pinet_fast.errors import ConfigError, StrataError

if TYPE_CHECKING:
    from pinet_fast.data.store import SequenceStore
    from pinet_fast.data.strata import Strata

IntArray = npt.NDArray[np.int64]


def offsets_of(lengths: IntArray) -> IntArray:
    """Return 0 and the running sums of the lengths, a new int64 [B + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ragged_batch(
    strata: Strata,
    users: IntArray,
    values: IntArray,
    offsets: IntArray,
    targets: IntArray | None = None,
    negatives: IntArray | None = None,
) -> RaggedBatch:
    """Wrap new arrays as a batch; the tensors share their memory."""
    lengths = np.diff(offsets)
    index = StrataIndex(
        torch.from_numpy(strata.ids[users]),
        strata.num_strata,
        lengths=torch.from_numpy(lengths),
        user_counts=strata.user_counts.tolist(),
        event_counts=strata.event_counts.tolist(),
    )
    return RaggedBatch(
        values=torch.from_numpy(values),
        offsets=torch.from_numpy(offsets),
        strata=index,
        users=torch.from_numpy(users),
        targets=None if targets is None else torch.from_numpy(targets),
        negatives=None if negatives is None else torch.from_numpy(negatives),
        max_len=int(lengths.max(initial=0)),
    )


def check_max_len(max_len: int) -> None:
    """Refuse a window that is no integer >= 1."""
    if isinstance(max_len, bool) or not isinstance(max_len, int) or max_len < 1:
        raise ConfigError(f"max_len: expected an integer >= 1, got {max_len!r}")


def check_strata(store: SequenceStore, strata: Strata) -> None:
    """Refuse strata that were made from another store."""
    if strata.store_fingerprint != store.fingerprint:
        raise StrataError(
            f"strata {strata.spec!r}: made from another store ({len(strata.ids):,} users) than "
            f"{store.source} ({store.num_users:,} users); make them from this one"
        )
