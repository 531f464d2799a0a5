"""The compiled lane against the interception in Python, on models and batches that are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drawn import BLOCKS, STARTS, Drawn
from support.lanes import Batch, compare

from pinet_fast.aggregation.lane import refusal
from pinet_fast.errors import PinetError

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no lane here: {refusal()}")


@st.composite
def drawn_batches(draw: Any, num_strata: int) -> list[Batch]:
    """Return batches with all strata, to settle, then any: one row, T == B, events or users."""
    made = []
    is_ragged = draw(st.booleans())
    for i in range(7):
        strata = draw(st.lists(st.integers(0, num_strata - 1), min_size=1, max_size=6))
        if i < 3:
            strata += range(num_strata)
        if draw(st.booleans()):
            strata.sort()
        lengths = None
        if is_ragged:
            at_least = draw(st.integers(0, 1))
            most = draw(st.integers(1, 3))
            lengths = [draw(st.integers(at_least, most)) for _ in strata]
            lengths[0] = max(lengths[0], 1)
            if i < 3:
                lengths = [n + 1 for n in lengths]
        made.append(Batch(strata, lengths, num_strata, seed=i))
    return made


def test_drawn_models_and_batches() -> None:
    calls = [0, 0]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.data(),
        st.integers(1, 5),
        st.sampled_from(list(STARTS)),
        st.lists(st.sampled_from(list(BLOCKS)), max_size=4),
        st.sampled_from([3, 4, 7]),
        st.sampled_from([torch.float32, torch.float64]),
        st.sampled_from(["agreement", "balanced", "mgda", "pcgrad"]),
    )
    def check(
        data: Any, num_strata: int, start: str, blocks: list[str], dim: int, dtype: torch.dtype,
        rule: str,
    ) -> None:  # fmt: skip
        ours, theirs = compare(
            lambda: Drawn(start, blocks, dim, dtype),
            data.draw(drawn_batches(num_strata)),
            forward=lambda model, batch: model(batch),
            rule=rule,
            num_strata=num_strata,
            catches=PinetError,
        )
        calls[0] += sum(ours.num_in_python)
        calls[1] += sum(theirs.num_in_python)

    check()
    assert calls[0] < 0.8 * calls[1]  # first uses, odd blocks and undecided rows are Python's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_between_two_others(block: str, dtype: torch.dtype) -> None:
    steps = [Batch([2, 0, 1, 1, 0, 2, 2][i % 2 :], [3, 1, 2, 4, 1, 2, 3][i % 2 :], seed=i)
             for i in range(6)]  # fmt: skip
    compare(
        lambda: Drawn("looked up", ["residual", block, "norm"], 5, dtype),
        steps,
        forward=lambda model, batch: model(batch),
    )
