"""Checkpoints: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pinet_fast.errors import CheckpointError
from pinet_fast.training.run_folder import replace_file

if TYPE_CHECKING:
    from pathlib import Path

_VERSION = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; the state holds tensors and plain values only."""
    buffer = io.BytesIO()
    torch.save({"version": _VERSION, "rng": torch.get_rng_state(), **state}, buffer)
    replace_file(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are ever unpickled.

    Raises:
        CheckpointError: Missing, damaged, or of another version.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no checkpoint there, so there is nothing to resume; start the run without "
            "--resume"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}); it is damaged or "
            "foreign: start the run anew in another folder"
        ) from None
    if version != _VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint version {_VERSION}, got {version}; use the pinet_fast "
            "that wrote it"
        )
    return state


def seed_everything(seed: int) -> None:
    """Seed every generator that a run may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third parties may use the global one
    torch.manual_seed(seed)
