"""Layers x situations x dtypes: every cell equals plain autograd, or is refused by name.

To 1e-10 in float64, 1e-5 in float32, and by the table of ``Layer.bf16`` in bf16.
"""

from __future__ import annotations

import pytest
import torch

from grid.layers import LAYERS
from grid.run import Run, outcome, run_cell
from grid.situations import MAY_REFUSE, NOT_APPLICABLE, REFUSED, SITUATIONS
from grid.table import DTYPES, markdown, tally

INDUCTOR = ("linear", "tied .T")
"""Layers compiled by inductor here in 16 and 32 bits too: `make grid` runs all."""

CELLS = [
    pytest.param(layer, situation, dtype, id=f"{layer}-{situation}-{str(dtype)[6:]}")
    for dtype in DTYPES
    for layer in LAYERS
    for situation in SITUATIONS
    if (situation, layer) not in NOT_APPLICABLE
    and (dtype is torch.float64 or situation != "compile (inductor)" or layer in INDUCTOR)
]
UNSLICED = [name for name, layer in LAYERS.items() if not layer.sliced]

pytestmark = pytest.mark.filterwarnings(
    # Raised inside torch: Dynamo, autocast of recurrent layers, and what inductor imports.
    "ignore::DeprecationWarning:torch",
    "ignore::FutureWarning:torch",
)


@pytest.mark.parametrize(("layer", "situation", "dtype"), CELLS)
def test_cell(layer: str, situation: str, dtype: torch.dtype) -> None:
    found = outcome(layer, situation, dtype)
    if found.kind == "FAILED":
        raise AssertionError(f"{layer}, {situation}: {found.detail}") from found.error
    if situation in REFUSED:
        assert found.kind == "refused"
    elif situation not in MAY_REFUSE:
        assert found.kind == "exact"


@pytest.mark.parametrize("layer", UNSLICED)
def test_these_layers_do_not_use_the_slice_rule(layer: str) -> None:
    torch.manual_seed(0)
    cell = SITUATIONS["unsorted strata"](LAYERS[layer], torch.float64)
    run = Run(cell, "agreement")
    run.gradients()
    entries = run.opt.coverage()
    assert {e.rule for e in entries} == {"boundary"}
    assert {e.parameter for e in entries} == {n for n, _ in cell.model.named_parameters()}
    assert all(e.proven is not None for e in entries), "a leak check that proved nothing"
    assert all(e.op for e in entries)


def test_nine_cells_in_ten_are_exact() -> None:
    counts = tally()
    assert counts["FAILED"] == 0, markdown()
    counted = counts["exact"] + counts["refused"]
    assert counts["exact"] >= 0.9 * counted, markdown()


def test_the_oracle_notices_a_wrong_gradient() -> None:
    """The comparison itself is tested: a cell whose data differ from the oracle's must fail."""
    torch.manual_seed(0)
    cell = SITUATIONS["unsorted strata"](LAYERS["linear"], torch.float64)
    step = cell.steps[0]
    step.row_ids = step.row_ids.roll(1)
    with pytest.raises(AssertionError, match=r"stratum 0: .* is off by"):
        run_cell(cell)
