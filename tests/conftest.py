"""Shared fixtures: real data where present, seeds, a store folder of the test's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeded_and_isolated(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every test starts from one seed and writes stores to a temporary folder."""
    torch.manual_seed(0)
    monkeypatch.setenv("PINET_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def real_data() -> Path:
    """Return the folder of public logs, or skip."""
    folder = Path(os.environ.get("PINET_FAST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no public logs at {folder}; PINET_FAST_DATA names their folder")
    return folder
