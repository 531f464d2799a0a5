"""Whole aggregated steps by the Triton kernels, in Triton's interpreter, equal plain autograd.

Run as a script, this file is the process with the interpreter: it prints a line per check.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # weights by agreement are exponentials of cosines


@pytest.fixture(scope="module")
def passed(interpreted):
    """Return the names of the checks that passed in the process with the interpreter."""
    return interpreted(__file__)


def assert_step_is_exact(loss, rule, num_strata):
    """Check ``p.grad`` against autograd and the reference's weights, and that every op ran."""
    from benchmarks.gpu_report.setting import Setting
    from benchmarks.gpu_report.whole_step import OPS, OPS_OF_LOSS, TINY, check_against_autograd

    setting = Setting(torch.device("cpu"), "triton", True, float("inf"))
    row = check_against_autograd(loss, rule, TINY, num_strata, setting)
    assert row["error"] <= TOLERANCE, row
    assert set(row["calls"]) == {*OPS, *OPS_OF_LOSS[loss]}
    assert all(count >= 1 for count in row["calls"].values()), row


def check_sasrec_by_every_rule():
    for rule in ("agreement", "balanced", "mgda"):
        assert_step_is_exact("bce", rule, 3)


def check_tied_encoder():
    assert_step_is_exact("ce", "agreement", 3)
    assert_step_is_exact("ce", "mgda", 2)


def check_plugin_heads_on_ragged_rows():
    from pinet_fast.aggregation import StrataIndex
    from pinet_fast.heads import PluginHeads
    from pinet_fast.kernels import _registry

    strata = StrataIndex(torch.tensor([2, 0, 2, 1]), 4, torch.tensor([3, 1, 5, 2]))
    heads = PluginHeads(4, 8)
    with torch.no_grad():
        heads.up_weight.normal_()
    rows = torch.randn(11, 8)
    before = _registry.num_calls("routed_linear", "triton")
    found = []
    for backend in ("triton", "reference"):
        with forced(backend):
            heads.zero_grad()
            out = heads(rows, strata.events)
            out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in heads.parameters())])
    assert _registry.num_calls("routed_linear", "triton") == before + 2
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def forced(backend):
    from benchmarks.gpu_report.whole_step import forced

    return forced(backend)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.interpret
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_the_interpreter(passed, check):
    assert check in passed


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from interpreter_checks import run_checks

    run_checks(CHECKS)
