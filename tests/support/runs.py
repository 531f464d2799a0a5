"""Looks into run folders, and interrupts runs."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pinet_fast.training import Observer
from pinet_fast.training.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(run / "checkpoint.pt")
    parts = {f"backbone.{k}": v for k, v in state["backbone"]["trained"].items()}
    if state["heads"] is not None:
        parts |= {f"heads.{k}": v for k, v in state["heads"]["trained"].items()}
    return parts


def log_of(run: Path) -> list[dict[str, Any]]:
    """Return the log without what measures time."""
    timed = ("seconds", "events_per_second")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert log_of(a) == log_of(b)
    ranks = [np.load(run / "test_ranks.npz") for run in (a, b)]
    for name in ranks[0].files:
        assert np.array_equal(ranks[0][name], ranks[1][name]), name


class StopAt(Observer):
    """Sends this process the signal of Ctrl-C at a given step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step_done(self, loss: float) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
