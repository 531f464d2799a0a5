"""From losses to one loss a stratum: vectors are reduced here, scalars are rescaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pinet_fast.aggregation.stratum_losses import StratumLosses
from pinet_fast.errors import AggregationError, ConfigError, RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.aggregation.rows import BatchRows
    from pinet_fast.aggregation.strata_index import RowGroups

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class LossRows:
    """The rows of a loss, by stratum.

    Attributes:
        counts: Rows of every stratum.
        totals: Summed row weights of every stratum; equal to ``counts`` without weights.
        unit: What a row is, ``users`` or ``events``.
    """

    counts: tuple[int, ...]
    totals: tuple[float, ...]
    unit: str

    @property
    def present(self) -> list[bool]:
        """Return which strata have rows of a weight above 0."""
        return [total > 0 for total in self.totals]


def stratum_losses(losses: Tensor, weights: Tensor | None, rows: BatchRows) -> StratumLosses:
    """Reduce losses to one mean a stratum (DESIGN section 3).

    Args:
        losses: One loss a user [B], an event [T], or [B, L] beside ``weights``.
        weights: Row weights >= 0 of the shape of ``losses``, a mask for example.
        rows: The batch's row layouts.

    Raises:
        AggregationError: Losses without graph, or weights that are negative or of another shape.
        RowLayoutError: Losses whose rows are neither users nor events of the batch.
    """
    if not isinstance(losses, Tensor) or not losses.requires_grad:
        raise AggregationError(
            "backward: expected a tensor of losses with a graph; got "
            f"{type(losses).__name__} without one - was the model called under no_grad?"
        )
    if weights is not None and weights.shape != losses.shape:
        raise AggregationError(
            f"backward: weights must be >= 0 and of the shape of the losses "
            f"{list(losses.shape)}; got shape {list(weights.shape)}"
        )
    groups, unit = _loss_rows(tuple(losses.shape), rows, "backward: losses")
    flat = losses if losses.dim() == 1 else losses.flatten()
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    if weights is None:
        counts = groups.counts
        return StratumLosses(flat, groups, LossRows(counts, _as_totals(counts), unit))
    totals = _totals(groups, weights.to(flat))
    scale = torch.where(totals > 0, totals.clamp_min(torch.finfo(totals.dtype).tiny), 1.0)
    factors = weights.flatten().to(flat) / scale.to(flat)[groups.ids]
    return StratumLosses(
        flat, groups, LossRows(groups.counts, tuple(totals.tolist()), unit), factors
    )


@dataclass(frozen=True)
class ScalarLoss:
    """How a training loop reduces its losses to the scalar it calls ``backward`` on.

    Attributes:
        rows: The rows of the reduction.
        factors: What the gradient of the scalar in every stratum's slice is multiplied by to be
            that of the stratum's mean loss, S numbers; 0 for absent strata.
    """

    rows: LossRows
    factors: tuple[float, ...]

    @classmethod
    def of(cls, reduction: Reduction, row_weights: Tensor | None, rows: BatchRows) -> ScalarLoss:
        """Describe a scalar that is the sum, or mean, of (weighted) losses.

        Args:
            reduction: ``"sum"``: ``sum_i w_i l_i``; ``"mean"``: that divided by ``sum_i w_i``.
            row_weights: Weights w, [B], [T] or [B, L]; None = 1 for every event where lengths are
                known, else for every user.
            rows: The batch's row layouts.

        Raises:
            ConfigError: Another reduction.
            AggregationError: Negative weights.
            RowLayoutError: Weights whose rows are neither users nor events.
        """
        if reduction not in get_args(Reduction):
            raise ConfigError(
                f'stratify: expected reduction "mean" or "sum", got {reduction!r}; for one loss a '
                "row leave it out and call opt.backward(losses)"
            )
        if row_weights is None:
            index = rows.strata
            groups, unit = index.users, "users"
            if index.events is not None:
                groups, unit = index.events, "events"
        else:
            groups, unit = _loss_rows(tuple(row_weights.shape), rows, "stratify: row_weights")
        totals = _as_totals(groups.counts)
        if row_weights is not None:
            totals = tuple(_totals(groups, row_weights.float()).tolist())
        whole = sum(totals) if reduction == "mean" else 1.0
        factors = tuple(whole / total if total > 0 else 0.0 for total in totals)
        return cls(LossRows(groups.counts, totals, unit), factors)


def _loss_rows(shape: tuple[int, ...], rows: BatchRows, what: str) -> tuple[RowGroups, str]:
    layout = rows.find(shape)
    if layout is None:
        raise RowLayoutError(
            f"{what} of shape {list(shape)} are neither one a user nor one an event of this batch "
            f"({rows.describe()}); use reduction='none' in the loss function, and pass lengths= "
            "to stratify for ragged batches"
        )
    return rows.groups_of(layout, shape), layout.kind


def _as_totals(counts: Sequence[int]) -> tuple[float, ...]:
    """Return the summed weights of every stratum where every row counts alike."""
    return tuple(map(float, counts))


def _totals(groups: RowGroups, weights: Tensor) -> Tensor:
    """Return the summed weights of every stratum, [S]."""
    if bool((weights < 0).any()):
        raise AggregationError(
            f"backward: weights must be >= 0; got a minimum of {float(weights.min())}"
        )
    return weights.new_zeros(groups.num_strata).index_add_(0, groups.ids, weights.flatten())


def mark_terms(losses: Tensor) -> None:
    """Set apart the derived numbers that were added to the losses, such as an L2 penalty.

    They have no rows: their gradient is the same for every stratum, and a rule that scaled it with
    the strata would change the penalty. Walks the sums at the end of the losses' graph.
    """
    nodes: list[Any] = [losses.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        term = getattr(node, "term", None)
        if term is not None:
            term.is_apart = True
        elif not _keeps_terms(node):
            continue
        nodes.extend(parent for parent, _ in node.next_functions)


_SUMS = frozenset(
    {"Add", "Sub", "View", "UnsafeView", "Squeeze", "Unsqueeze", "Alias", "ToCopy", "Clone",
     "CopyBackwards"}
)  # fmt: skip


def _keeps_terms(node: Any) -> bool:
    """Return whether a node treats all rows alike: a sum, or a product with one number."""
    name = type(node).__name__.removesuffix("Backward0")
    if name in ("Mul", "Div"):
        factors = (getattr(node, "_saved_self", None), getattr(node, "_saved_other", None))
        return all(f is None or f.numel() == 1 for f in factors)
    return name in _SUMS


def check_scalar(losses: Tensor, weights: Tensor | None) -> None:
    """Check what ``backward`` is given after ``stratify(reduction=...)``.

    Raises:
        AggregationError: Losses that are not reduced, or weights.
    """
    if losses.dim() or weights is not None:
        raise AggregationError(
            f"backward: stratify(reduction=...) expects the reduced scalar without weights, got "
            f"losses of shape {list(losses.shape)}; drop reduction= to have one loss a row reduced "
            "here"
        )
