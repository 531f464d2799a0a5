"""A small log and runs on it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pinet_fast.data import simulate_log
from pinet_fast.training import RunConfig

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def small_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a simulated log of 200 users."""
    return simulate_log(
        tmp_path_factory.mktemp("log") / "small.parquet", users=200, items=100, seed=1
    )


@pytest.fixture
def config(small_log: Path) -> RunConfig:
    """Return options of a run that takes a second or two."""
    return replace(
        RunConfig(data=str(small_log)),
        rule="agreement",
        epochs=3,
        head_epochs=2,
        batch_size=64,
        max_len=10,
        dim=8,
        log_every=1,
        threads=1,
    )
