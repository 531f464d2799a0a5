from __future__ import annotations

import numpy as np
import pytest

from pinet_fast.data.floor import GatherSpeed, MemoryFloor, random_places


def test_floor_adds_lines_and_copies():
    floor = MemoryFloor(line_seconds=1e-8, copy_rate=1e10)
    assert floor.seconds(1000, 30_000) == pytest.approx(2.125 * 1000 * 1e-8 + 30_000 * 4 / 1e10)
    two = floor.seconds(1000, 30_000, event_bytes=12, columns=2)
    assert two == pytest.approx(3.125 * 1000 * 1e-8 + 30_000 * 12 / 1e10)


def test_costs_are_measured():
    floor = MemoryFloor.measure(table_bytes=1 << 22, copy_bytes=1 << 16)
    assert 0 < floor.line_seconds < 1e-5
    assert 1e7 < floor.copy_rate < 1e13


def test_gather_is_measured_against_the_floor():
    floor = MemoryFloor(line_seconds=1e-8, copy_rate=1e10)
    found = GatherSpeed.measure(floor, table_bytes=1 << 22, batch_size=256)
    assert 25 < found.mean_events < 35
    # eta times the measured time is the floor, up to the quantiles of both.
    floor_of_row = floor.seconds(1, 30)
    assert found.eta * found.row_seconds == pytest.approx(floor_of_row, rel=0.2)


def test_places_share_no_line():
    places = random_places(8 * 1000, seed=3)
    assert len(np.unique(places // 8)) == len(places) == 1000
    assert places.max() < 8 * 1000
