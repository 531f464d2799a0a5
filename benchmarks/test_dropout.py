"""Masks of dropout, relative to drawing them by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from pinet_fast.kernels import dropout_mask

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES, WIDTH, RATE = 7, 64, 0.2


@pytest.mark.parametrize("rows", [783, 6400])
@pytest.mark.parametrize("against", ["reference", "F.dropout"])
def test_masks_of_a_step(
    against: str, rows: int, paired: Callable[..., Any], benchmark: Any
) -> None:
    """Seven masks, those of a SASRec of two blocks, for a batch of Beauty and a full one."""
    benchmark.group = "dropout"
    like = torch.ones(rows, WIDTH)

    def ours() -> Any:
        return dropout_mask(like, RATE, count=PLACES)

    def theirs() -> Any:
        if against == "reference":
            return dropout_mask(like, RATE, count=PLACES, backend="reference")
        return [F.dropout(like, RATE) for _ in range(PLACES)]

    for mask in (*ours(), *theirs()):
        assert abs(float(mask.mean()) - 1) < 0.02
    assert paired(ours, theirs).ratio > 0
