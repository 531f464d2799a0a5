"""What a loader yields: ragged sequences, their strata, targets and negatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pinet_fast.aggregation.strata_index import RowGroups, StrataIndex
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Side = Literal["left", "right"]

_TENSORS = (
    "values", "offsets", "users", "targets", "negatives", "weights", "negatives_log_q"
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """B sequences of T events in all, laid out one after the other without padding.

    Users of a stratum are contiguous, and strata ascend.

    Attributes:
        values: Item codes 1..V, int64 [T].
        offsets: int64 [B + 1]; user ``b`` owns events ``offsets[b]`` to ``offsets[b + 1]``.
        strata: Strata of the users and, through the lengths, of the events.
        users: Row numbers of the store, int64 [B].
        targets: Item to be predicted at every event, int64 [T], or one for every user, int64 [B],
            or None.
        negatives: Items drawn as negatives, int64 [T, n] (a target each), [B, n] or [n], or None.
        max_len: Events of the longest sequence of this batch; on the host, so that a model need
            not wait for the device to learn it.
        weights: Weight of every user in an unbiased mean, float32 [B], or None where all are 1.
        negatives_log_q: Log-probability of every negative, float32 in their shape, or None.
    """

    values: Tensor
    offsets: Tensor
    strata: StrataIndex
    users: Tensor
    targets: Tensor | None
    negatives: Tensor | None
    max_len: int
    weights: Tensor | None = None
    negatives_log_q: Tensor | None = None

    def __len__(self) -> int:
        """Return B."""
        return self.num_users

    @property
    def lengths(self) -> Tensor:
        """Return the events of every user, int64 [B]."""
        return self.offsets.diff()

    @property
    def num_users(self) -> int:
        """Return B."""
        return self.users.numel()

    @property
    def num_events(self) -> int:
        """Return T."""
        return self.values.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RaggedBatch:
        """Return the batch on a device; tensors that are there already are shared."""
        moved = self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, strata=self.strata.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RaggedBatch:
        """Return the batch in page-locked memory, for ``to(device, non_blocking=True)``."""
        pinned: RaggedBatch = pytree.tree_map(lambda tensor: tensor.pin_memory(), self)
        return pinned

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that a stream uses the batch, as ``Tensor.record_stream`` does."""
        for tensor in pytree.tree_leaves(self):
            if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
                tensor.record_stream(stream)

    def to_padded(
        self, side: Side = "right", value: int = 0, *, rows: Tensor | None = None
    ) -> Tensor:
        """Return one row a user, padded to ``max_len`` columns.

        Args:
            side: Where the padding is: ``"left"`` or ``"right"``.
            value: What it is.
            rows: What to lay out, a row for every event, [T, ...]; None for the values.

        Returns:
            A new tensor [B, max_len, ...].

        Raises:
            ConfigError: Another side, or another number of rows.
        """
        if rows is None:
            rows = self.values
        if rows.dim() == 0 or len(rows) != self.num_events:
            raise ConfigError(
                f"rows: expected one for each of the {self.num_events} events, "
                f"got shape {list(rows.shape)}"
            )
        mask = self.padded_mask(side)
        out = rows.new_full((*mask.shape, *rows.shape[1:]), value)
        out[mask] = rows
        return out

    def padded_mask(self, side: Side = "right") -> Tensor:
        """Return where ``to_padded`` puts events, bool [B, max_len].

        Args:
            side: As there.

        Raises:
            ConfigError: Another side.
        """
        if side not in get_args(Side):
            raise ConfigError(f"side: expected 'left' or 'right', got {side!r}")
        column = torch.arange(self.max_len, device=self.values.device)
        lengths = self.lengths.unsqueeze(1)
        return column < lengths if side == "right" else column >= self.max_len - lengths

    def to_nested(self) -> Tensor:
        """Return the values as a jagged nested tensor, a view of them."""
        return torch.nested.nested_tensor_from_jagged(
            self.values, self.offsets, max_seqlen=self.max_len
        )

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> RaggedBatch:
        changed: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else function(tensor)
            for name in _TENSORS
        }
        return replace(self, **changed)

    def __repr__(self) -> str:
        parts = [f"users=[{self.num_users}]", f"values=[{self.num_events}]"]
        if self.targets is not None:
            parts.append(f"targets={list(self.targets.shape)}")
        if self.negatives is not None:
            parts.append(f"negatives={list(self.negatives.shape)}")
        return (
            f"RaggedBatch({', '.join(parts)}, strata={self.strata.num_strata}, "
            f"max_len={self.max_len}, device={self.values.device})"
        )


# A pytree takes None for a leaf, and functions of tensors cannot: only what is there is flattened,
# and the names of it are kept beside.


def _flatten(batch: RaggedBatch) -> tuple[list[Any], tuple[Any, ...]]:
    present = {name: value for name in _TENSORS if (value := getattr(batch, name)) is not None}
    return [*present.values(), batch.strata], (tuple(present), batch.max_len)


def _unflatten(children: Iterable[Any], about: tuple[Any, ...]) -> RaggedBatch:
    *tensors, strata = children
    names, max_len = about
    parts: dict[str, Any] = {"targets": None, "negatives": None}
    parts.update(zip(names, tensors, strict=True))
    return RaggedBatch(strata=strata, max_len=max_len, **parts)


_STRATA_TENSORS = ("ids", "lengths", "user_ids", "user_order", "event_ids", "event_order")


def _flatten_strata(index: StrataIndex) -> tuple[list[Any], tuple[Any, ...]]:
    users, events = index.users, index.events
    tensors = [index.ids, index.lengths, users.ids, users.order]
    tensors += [None, None] if events is None else [events.ids, events.order]
    present = {
        name: value for name, value in zip(_STRATA_TENSORS, tensors, strict=True)
        if value is not None
    }  # fmt: skip
    about = (index.num_strata, index.user_counts, index.event_counts, users.offsets)
    event_offsets = None if events is None else events.offsets
    return [*present.values()], (tuple(present), *about, event_offsets)


def _unflatten_strata(children: Iterable[Any], about: tuple[Any, ...]) -> StrataIndex:
    names, num_strata, user_counts, event_counts, user_offsets, event_offsets = about
    parts = dict(zip(names, children, strict=True))
    index = object.__new__(StrataIndex)
    index.ids, index.lengths, index.num_strata = parts["ids"], parts.get("lengths"), num_strata
    index.user_counts, index.event_counts = user_counts, event_counts
    user_order, event_order = parts.get("user_order"), parts.get("event_order")
    index.users = RowGroups(parts["user_ids"], num_strata, user_offsets, user_order)
    index.events = None
    if event_offsets is not None:
        index.events = RowGroups(parts["event_ids"], num_strata, event_offsets, event_order)
    return index


def sorted_strata(
    ids: Tensor,
    event_ids: Tensor,
    lengths: Tensor,
    *,
    user_offsets: tuple[int, ...],
    event_offsets: tuple[int, ...],
    user_counts: tuple[int, ...],
    event_counts: tuple[int, ...],
) -> StrataIndex:
    """Return the index of users that are known to be sorted by stratum, without looking at them.

    On a device, the checks of ``StrataIndex`` would wait for it.
    """
    num_strata = len(user_offsets) - 1
    names = ("ids", "lengths", "user_ids", "event_ids")
    about = (names, num_strata, user_counts, event_counts, user_offsets, event_offsets)
    return _unflatten_strata([ids, lengths, ids, event_ids], about)


pytree.register_pytree_node(
    RaggedBatch, _flatten, _unflatten, serialized_type_name="pinet_fast.RaggedBatch"
)
pytree.register_pytree_node(
    StrataIndex, _flatten_strata, _unflatten_strata, serialized_type_name="pinet_fast.StrataIndex"
)
