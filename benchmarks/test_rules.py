"""Microseconds of every Gram rule; absolute, for orientation: no gate."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from pinet_fast import rules

NAMES = [name for name in rules.names() if isinstance(rules.by_name(name), rules.GramRule)]


@pytest.mark.parametrize("num_strata", [4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_gram_rule(
    name: str, num_strata: int, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.group = f"rules, S = {num_strata}"
    torch.manual_seed(0)
    gradients = torch.randn(num_strata, 20, dtype=torch.float64)
    gram = gradients @ gradients.T
    rule = rules.by_name(name)
    assert isinstance(rule, rules.GramRule)
    if rule.per_parameter:
        gram = gram.unsqueeze(0)
    assert rule.weights(gram).isfinite().all()
    benchmark.pedantic(rule.weights, args=(gram,), rounds=50, warmup_rounds=5)
    if benchmark.disabled:
        return
    microseconds = benchmark.stats.stats.median * 1e6
    benchmark.extra_info.update(
        microseconds=microseconds,
        fastest=benchmark.stats.stats.min * 1e6,
        machine=platform.machine(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    with capsys.disabled():
        print(f"\n{name}, S = {num_strata}: {microseconds:.0f} us")
