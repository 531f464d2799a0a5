"""Milliseconds of CPU that importing takes above torch; the tests hold them to a limit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

_CODE = """
import time, torch
started = time.process_time()
{statement}
print(time.process_time() - started)
"""


@pytest.mark.parametrize(
    "statement", ["import pinet_fast", "from pinet_fast import GradientAggregator, RaggedLoader"]
)
def test_import(statement: str, benchmark: Any, capsys: Any) -> None:
    benchmark.group = "import"
    command = [sys.executable, "-c", _CODE.format(statement=statement)]
    runs = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1e3
        for _ in range(1 if benchmark.disabled else 5)
    ]
    benchmark.extra_info["cpu_ms"] = min(runs)
    benchmark.pedantic(lambda: None, rounds=1)
    with capsys.disabled():
        print(f"\n{statement}: {min(runs):.1f} ms above torch")
