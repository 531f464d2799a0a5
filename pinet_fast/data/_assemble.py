"""Builds the part of a ragged batch that training and evaluation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pinet_fast.aggregation.strata_index import StrataIndex
from pinet_fast.data import _njit
from pinet_fast.data.batch import RaggedBatch, sorted_strata
from pinet_fast.errors import ConfigError, StrataError

if TYPE_CHECKING:
    from torch import Tensor

    from pinet_fast.data._blocks import Layout
    from pinet_fast.data.store import SequenceStore
    from pinet_fast.data.strata import Strata

IntArray = npt.NDArray[np.int64]


def spans_of(starts: IntArray, lengths: IntArray, strata: Strata) -> IntArray:
    """Return where every user begins, the training events and the stratum, int64 [2 U].

    The three lie in one line of memory, see ``_njit.plan``.
    """
    if strata.num_strata >= 1 << _njit.SPAN_BITS:
        raise StrataError(
            f"strata {strata.spec!r}: expected fewer than {1 << _njit.SPAN_BITS:,}, "
            f"got {strata.num_strata:,}"
        )
    spans = np.empty(2 * len(starts), np.int64)
    spans[::2] = starts
    spans[1::2] = lengths << _njit.SPAN_BITS | strata.ids
    return spans


@dataclass(frozen=True, eq=False)
class Assembly:
    """How a batch lies in its block, and what of it stays on the host.

    Attributes:
        layout: Places of the arrays; their names are the fields of a batch, or ``strata_ids``,
            ``event_ids`` and ``lengths`` of its strata.
        max_len: Events of the longest sequence.
        user_offsets: Row offsets of the users by stratum, S + 1 ints.
        event_offsets: Row offsets of the events by stratum.
    """

    layout: Layout
    max_len: int
    user_offsets: tuple[int, ...]
    event_offsets: tuple[int, ...]

    def batch(self, strata: Strata, block: Tensor) -> RaggedBatch:
        """Return the batch whose tensors are views of a filled block."""
        parts: dict[str, Any] = dict(self.layout.tensors(block))
        index = sorted_strata(
            parts.pop("strata_ids"),
            parts.pop("event_ids"),
            parts.pop("lengths"),
            user_offsets=self.user_offsets,
            event_offsets=self.event_offsets,
            user_counts=tuple(strata.user_counts.tolist()),
            event_counts=tuple(strata.event_counts.tolist()),
        )
        for name in ("targets", "negatives", "weights", "negatives_log_q"):
            parts.setdefault(name, None)
        return RaggedBatch(strata=index, max_len=self.max_len, **parts)


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
