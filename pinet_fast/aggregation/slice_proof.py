"""What the first use of a call site under the slice rule establishes.

The outputs by stratum are compared with one call on the whole batch, which catches what the leak
check cannot see: a sliced BatchNorm has other statistics and leaks nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pinet_fast.errors import BoundaryError, RowLayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pinet_fast.aggregation.leaves import Root
    from pinet_fast.aggregation.strata_index import RowGroups

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative to the largest output: slices of a batch round differently in matrix products."""


@dataclass(frozen=True)
class SliceProof:
    """What the first use of a call site established.

    Attributes:
        dims: Row dimension of every tensor among the outputs, None where it has no rows.
        is_random: The function draws random numbers, so its forward could not be compared.
    """

    dims: tuple[int | None, ...]
    is_random: bool


@torch.no_grad()
def whole_call(
    func: Callable[..., Any], values: list[Any], roots: list[Root | None], spec: Any
) -> tuple[list[Any], list[Any]]:
    """Call ``func`` twice on the whole batch; on copies, so that no buffer moves."""
    results = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            copies = [
                v.detach() if root is not None else v.clone() if isinstance(v, Tensor) else v
                for v, root in zip(values, roots, strict=True)
            ]
            args, kwargs = pytree.tree_unflatten(copies, spec)
            results.append(pytree.tree_flatten(func(*args, **kwargs))[0])
    return results[0], results[1]


def prove(
    name: str,
    pieces: list[list[Any]],
    whole: tuple[list[Any], list[Any]],
    groups: RowGroups,
) -> SliceProof:
    """Find where the outputs hold the rows.

    Args:
        name: The function's, for messages.
        pieces: Its flat outputs of every stratum that is present.
        whole: Those of :func:`whole_call`.
        groups: The rows by stratum.

    Raises:
        RowLayoutError: It is undecided for one of the outputs.
    """
    counts = [count for count in groups.counts if count]
    is_random = any(
        isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(*whole, strict=True)
    )
    dims: list[int | None] = []
    for i, full in enumerate(whole[0]):
        if not isinstance(full, Tensor):
            dims.append(None)
            continue
        fitting = [
            dim
            for dim, size in enumerate(full.shape)
            if size % groups.num_rows == 0
            and all(
                part[i].shape[dim] * groups.num_rows == size * count
                for part, count in zip(pieces, counts, strict=True)
            )
        ]
        if len(fitting) > 1 and len(counts) > 1:
            fitting = [d for d in fitting if pieces[0][i].shape[d] != full.shape[d]]
        if not fitting or (len(fitting) > 1 and len(counts) > 1):
            raise RowLayoutError(
                f"{name}: cannot tell which dimension of its output {list(full.shape)} holds the "
                f"{groups.num_rows} rows; the function mixes or drops rows: keep the batch "
                'dimension, or use GradientAggregator(..., mode="exact")'
            )
        dims.append(fitting[0])
    return SliceProof(tuple(dims), is_random)


def compare(name: str, joined: list[Any], whole: list[Any]) -> None:
    """Compare the outputs, put together from the strata, with those of the whole batch.

    Raises:
        BoundaryError: They differ by more than rounding.
    """
    for mine, full in zip(joined, whole, strict=True):
        if not isinstance(full, Tensor) or not full.is_floating_point():
            continue
        scale = float(full.abs().max()) if full.numel() else 0.0
        error = float((mine.detach() - full).abs().max()) if full.numel() else 0.0
        if not error <= _TOLERANCE.get(full.dtype, 2e-2) * scale:
            raise BoundaryError(
                f"{name}: gives other values for a stratum alone than for the whole batch "
                f"(difference {error:.2g}), so it computes across rows, as batch statistics do; "
                "use a norm over features (LayerNorm, GroupNorm), or put the layer into "
                "evaluation mode"
            )
